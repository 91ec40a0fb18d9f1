# services.layeredStores: layered Nix stores on NixOS.
#
# options.nix      what can be declared
# keys.nix         the options that are keys of the configuration, and that made of them
# keys.json        what the keys are for, made from the daemon's own table of them
# lib.nix          paths, unit names and store URLs, as the daemon reads them
# settings.nix     what follows from a configuration
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
