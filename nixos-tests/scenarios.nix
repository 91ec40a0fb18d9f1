# The files that describe a scenario, by name: every .nix beside a script of the same name.
{ lib }:

let
  files = builtins.readDir ./.;
  scripts = lib.filter (file: lib.hasSuffix ".py" file) (lib.attrNames files);
  names = map (lib.removeSuffix ".py") scripts;
in
lib.genAttrs (lib.filter (name: files ? "${name}.nix") names) (name: ./. + "/${name}.nix")
