# `nix flake lock` writes flake.lock, which pins Nixpkgs; the first user of a clone without one does
# that by using the flake.
{
  description = "Declares, mounts and looks after layered Nix stores";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      # Other systems may do; these are looked at.
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      eachSystem = make: lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
    in
    {
      nixosModules.default = ./module;

      overlays.default = import ./nix/overlay.nix;

      packages = eachSystem (pkgs: rec {
        layered-stores = pkgs.callPackage ./nix/package.nix { };
        default = layered-stores;
        docs = pkgs.callPackage ./nix/docs.nix { };
        option-reference = (import ./nix/checks.nix { inherit pkgs; }).optionReference;
      });

      checks = eachSystem (
        pkgs:
        import ./nix/checks.nix { inherit pkgs; }
        // lib.mapAttrs' (name: lib.nameValuePair "scenario-${name}") (
          import ./nixos-tests { inherit pkgs; }
        )
      );

      devShells = eachSystem (pkgs: {
        default = import ./shell.nix { inherit pkgs; };
      });

      formatter = eachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
