# The systems of the scenario `switch`, by the names of its specialisations; "" is the one without.
{
  lib,
  pkgs,
  nixos,
}:

let
  test = pkgs.testers.runNixOSTest {
    imports = [ ../switch.nix ];
    defaults = nixos.onDebian;
  };
  inherit (test.nodes) machine;
  systems = {
    "" = machine;
  }
  // lib.mapAttrs (_name: special: special.configuration) machine.specialisation;
in
{
  systems = lib.mapAttrs (
    _name: config:
    nixos.files config
    // {
      nixConf = config.environment.etc."nix/nix.conf".source.text;
      package = config.services.layeredStores.package.outPath;
    }
  ) systems;
  # As it is before it is built.
  switchToConfiguration = builtins.readFile (
    pkgs.path + "/nixos/modules/system/activation/switch-to-configuration.pl"
  );
}
