# Every scenario as a NixOS test: nix-build nixos-tests -A basic
{
  pkgs ? import <nixpkgs> { },
}:

let
  inherit (pkgs) lib;
  scenarios = import ./scenarios.nix { inherit lib; };
in
lib.mapAttrs (_name: pkgs.testers.runNixOSTest) scenarios
