# Every scenario as a NixOS test: nix-build nixos-tests -A basic
{
  pkgs ? import <nixpkgs> { },
}:

let
  inherit (pkgs) lib;
  scenarios = import ./scenarios.nix { inherit lib; };
in
lib.mapAttrs (
  _name: scenario:
  pkgs.testers.runNixOSTest {
    imports = [ scenario ];
    # The scripts are linted and typed by the driver that runs them on Debian.
    skipLint = true;
    skipTypeCheck = true;
  }
) scenarios
