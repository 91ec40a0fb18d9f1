# What the module makes of configurations, without a machine and without building anything:
#
#   NIXPKGS=… nix-instantiate --eval --strict --json --readonly-mode nixos-tests/eval -A report
#   NIXPKGS=… nix-instantiate --eval --strict --readonly-mode nixos-tests/eval -A check
#
# The second fails if a test does. NIXPKGS is a checkout of Nixpkgs. Without it, <nixpkgs>.
{
  nixpkgs ? (
    let
      fromEnvironment = builtins.getEnv "NIXPKGS";
    in
    if fromEnvironment != "" then /. + fromEnvironment else <nixpkgs>
  ),
  pkgs ? import nixpkgs { },
  lib ? pkgs.lib,
}:

let
  nixos = import ./nixos.nix {
    inherit lib pkgs;
    nixpkgs = toString nixpkgs;
  };
  inherit (nixos) evaluate;

  # A configuration of layered stores, and what becomes of it.
  withStores = stores: evaluate [ (layered { inherit stores; }) ];
  layered = settings: { services.layeredStores = settings // { enable = true; }; };

  tests =
    import ./scenarios.nix { inherit lib pkgs; }
    // import ./values.nix { inherit lib pkgs nixos withStores layered; }
    // import ./units.nix { inherit lib pkgs nixos layered; }
    // lib.mapAttrs' (
      name: refusal:
      lib.nameValuePair "test refused: ${name}" {
        expr = refusedBy refusal.configuration;
        expected = { inherit (refusal) types assertions; };
      }
    ) refusals
    // {
      "test every refusal is in one place" = {
        expr = lib.attrNames (
          lib.filterAttrs (
            _name: refusal:
            lib.count (where: refusal.${where} != [ ]) [
              "types"
              "assertions"
              "build"
            ] != 1
          ) refusals
        );
        expected = [ ];
      };
    }
    // import ./documentation.nix { inherit lib pkgs options; };
  refusals = import ./refusals { inherit lib nixos layered; };

  # What is not refused at all is evaluated as far as a build needs it.
  refusedBy =
    configuration:
    let
      evaluated = evaluate [ configuration ];
      types = evaluated.untyped;
      assertions = lib.optionals (types == [ ]) evaluated.failures;
      needed = {
        inherit (evaluated) toml units wants;
        inherit (evaluated.said) extraConfig;
      };
    in
    lib.deepSeq (if types ++ assertions == [ ] then needed else null) { inherit types assertions; };

  failures = lib.runTests tests;
  inherit (evaluate [ ]) options;
in
rec {
  inherit options;

  report = {
    inherit failures;
    tests = lib.length (lib.attrNames tests);
    nixos = lib.trivial.release;
  };

  check =
    if failures == [ ] then
      "${toString report.tests} tests passed"
    else
      throw "${toString (lib.length failures)} of ${toString report.tests} tests failed:\n${
        lib.concatMapStringsSep "\n" builtins.toJSON failures
      }";

  # A reference of all options in Markdown.
  optionReference = import ../../nix/option-reference.nix { inherit lib options; };

  # What is wrong with configurations that are files, by all of NixOS.
  complaints = map (
    file:
    let
      inherit (nixos.evaluateSystem [ nixos.onDebian file ]) config;
    in
    map (assertion: assertion.message) (lib.filter (found: !found.assertion) config.assertions)
    ++ config.warnings
  );

  # For the scenario that boots what is rendered here, and asks `layered-stores check-config` about
  # what it is left to refuse.
  machine = {
    booted = lib.getAttrs [ "toml" "units" "wants" "polkit" "uris" ] (
      import ./booted.nix { inherit lib evaluate; }
    );
    refused = lib.mapAttrs (
      _name: refusal: {
        inherit (evaluate [ refusal.configuration ]) toml;
        inherit (refusal) build;
      }
    ) (lib.filterAttrs (_name: refusal: refusal.build != [ ]) refusals);
    inherit report optionReference;
  };

  # For the scenario that switches from one system to another.
  switched = import ./switched.nix { inherit lib pkgs nixos; };
}
