# The package. `make install` decides what goes where, here as on every other system.
#
# This file has been evaluated, and not yet built: that takes all of Nixpkgs. What that leaves open
# is the place of the executables (Nixpkgs' hooks for cargo build below target/<platform>/release),
# and whether every test of the library passes in the sandbox.
{
  lib,
  stdenv,
  rustPlatform,
  testers,
}:

let
  cargo = lib.importTOML ../Cargo.toml;
  manifest = cargo.package // cargo.workspace.package;
in
rustPlatform.buildRustPackage {
  pname = manifest.name;
  inherit (manifest) version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../CHANGELOG.md
      ../LICENSE-APACHE
      ../LICENSE-MIT
      ../Makefile
      ../README.md
      ../benches
      ../crates
      ../data
      ../docs
      ../src
    ];
  };

  cargoLock.lockFile = ../Cargo.lock;

  # crates/overlay/tests make mounts, for which there are the scenarios.
  cargoTestFlags = [ "--lib" ];

  # With a name that no program has for cargo, make takes what was built before.
  installPhase = ''
    runHook preInstall
    executable=$(find target -path '*/release/layered-storesd' -type f -print -quit)
    make install \
      CARGO=cargo-has-built-it \
      release="''${executable%/*}" \
      PREFIX="$out" \
      SYSCONFDIR="$out/etc"
    runHook postInstall
  '';

  passthru.tests = lib.mapAttrs (_name: testers.runNixOSTest) (
    import ../nixos-tests/scenarios.nix { inherit lib; }
  );

  meta = {
    inherit (manifest) description;
    # OWNER is written for where one got this from, as in the manual.
    homepage = "https://github.com/OWNER/layered-stores";
    changelog = "https://github.com/OWNER/layered-stores/blob/v${manifest.version}/CHANGELOG.md";
    maintainers = import ./maintainers.nix;
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "layered-stores";
    platforms = lib.platforms.linux;
    # Manual pages and completions are written by the executable itself.
    broken = !stdenv.buildPlatform.canExecute stdenv.hostPlatform;
  };
}
