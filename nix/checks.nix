# What `nix flake check` builds, beside the scenarios.
{ pkgs }:

let
  inherit (pkgs) lib;
  package = pkgs.callPackage ./package.nix { };
  evaluation = import ../nixos-tests/eval {
    inherit pkgs;
    nixpkgs = pkgs.path;
  };
in
{
  inherit package;

  clippy = package.overrideAttrs (old: {
    pname = "${old.pname}-clippy";
    nativeBuildInputs = old.nativeBuildInputs ++ [ pkgs.clippy ];
    buildPhase = ''
      runHook preBuild
      cargo clippy --all-targets --offline -- -D warnings
      runHook postBuild
    '';
    dontCargoInstallPostBuildHook = true;
    postBuild = "";
    doCheck = false;
    installPhase = "touch $out";
  });

  # Fails while it is evaluated if a test does.
  evaluation = pkgs.runCommand "layered-stores-evaluation" { } ''
    echo ${lib.escapeShellArg evaluation.check} | tee $out
  '';

  # By Nixpkgs' own renderer, which knows of things that nixos-tests/eval does not look for.
  optionDocumentation =
    (pkgs.nixosOptionsDoc {
      options.services = { inherit (evaluation.options.services) layeredStores; };
      warningsAreErrors = true;
    }).optionsCommonMark;

  optionReference = pkgs.writeText "options.md" evaluation.optionReference;

  formatting =
    let
      files = lib.fileset.toSource {
        root = ../.;
        fileset = lib.fileset.fileFilter (file: file.hasExt "nix") ../.;
      };
    in
    pkgs.runCommand "layered-stores-formatting" { nativeBuildInputs = [ pkgs.nixfmt ]; } ''
      find ${files} -name '*.nix' -exec nixfmt --check {} +
      touch $out
    '';
}
