# Without flakes:
#
#   imports = [ (import /path/to/this).module ];     services.layeredStores
#   nix-build -A package
#   nix-build -A tests.basic
{
  pkgs ? import <nixpkgs> { },
}:

{
  package = pkgs.callPackage ./nix/package.nix { };
  module = ./module;
  overlay = import ./nix/overlay.nix;
  checks = import ./nix/checks.nix { inherit pkgs; };
  tests = import ./nixos-tests { inherit pkgs; };
}
