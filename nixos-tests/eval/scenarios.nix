# The stores of every scenario are those that it has where it does not run on NixOS.
{ lib, evaluate }:

let
  scenarios = import ../scenarios.nix { inherit lib; };
  toml = name: ../. + "/${name}.toml";
  declared =
    name:
    if builtins.pathExists (toml name) then
      builtins.fromTOML (builtins.readFile (toml name))
    else
      { stores = { }; };
  files = lib.attrNames (builtins.readDir ../.);
  named = suffix: map (lib.removeSuffix suffix) (lib.filter (lib.hasSuffix suffix) files);
  # Scenarios that are about a system other than NixOS, and about NixOS alone.
  debianOnly = [
    "deb"
    "module"
  ];
  nixosOnly = [ "switch" ];
in
lib.mapAttrs' (
  name: file:
  lib.nameValuePair "test scenario ${name}" {
    expr = {
      inherit (evaluate [ (import file).nodes.machine ]) settings failures;
    };
    expected = {
      settings = declared name;
      failures = [ ];
    };
  }
) (removeAttrs scenarios nixosOnly)
// {
  "test every scenario has a file for NixOS" = {
    expr = lib.subtractLists (lib.attrNames scenarios ++ debianOnly) (named ".py");
    expected = [ ];
  };
}
