# services.layeredStores: layered Nix stores on NixOS.
#
# options.nix      what can be declared
# lib.nix          paths, unit names and store URLs, as the daemon reads them
# settings.nix     from the options to the daemon's configuration, and what follows from it
# problems.nix     what the daemon would refuse in such a configuration
# assertions.nix   the same, said while a system is evaluated
# service.nix      units, D-Bus, polkit, /etc
{
  imports = [
    ./options.nix
    ./assertions.nix
    ./service.nix
  ];

  meta.maintainers = import ../nix/maintainers.nix;
}
