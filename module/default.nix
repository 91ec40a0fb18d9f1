# services.layeredStores: layered Nix stores on NixOS.
#
# options.nix      what can be declared
# lib.nix          paths, unit names and store URLs, as the daemon reads them
# settings.nix     from the options to the daemon's configuration, and what follows from it
# assertions.nix   what neither a type nor the daemon can say, or not in time
# service.nix      units, D-Bus, polkit, /etc; the daemon's word on its configuration
{
  imports = [
    ./options.nix
    ./assertions.nix
    ./service.nix
  ];

  meta.maintainers = import ../nix/maintainers.nix;
}
