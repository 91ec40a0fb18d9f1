# What one works on this with.
{
  pkgs ? import <nixpkgs> { },
}:

pkgs.mkShell {
  inputsFrom = [ (pkgs.callPackage ./nix/package.nix { }) ];
  packages = [
    pkgs.cargo-deny
    pkgs.cargo-nextest
    pkgs.clippy
    pkgs.mypy
    pkgs.nixfmt
    pkgs.ruff
    pkgs.rust-analyzer
    pkgs.rustfmt
    pkgs.shellcheck
    pkgs.typos
  ];
}
