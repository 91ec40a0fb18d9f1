# What the module makes of configurations, without a machine and without building anything:
#
#   NIXPKGS=… nix-instantiate --eval --strict --json nixos-tests/eval -A report
#   NIXPKGS=… nix-instantiate --eval --strict nixos-tests/eval -A check     fails if a test does
#
# NIXPKGS is a checkout of Nixpkgs, a part of one, or its library alone. Without it, <nixpkgs>.
{
  nixpkgs ? (
    let
      fromEnvironment = builtins.getEnv "NIXPKGS";
    in
    if fromEnvironment != "" then /. + fromEnvironment else <nixpkgs>
  ),
  lib ? import (
    if builtins.pathExists (nixpkgs + "/lib/modules.nix") then nixpkgs + "/lib" else nixpkgs
  ),
}:

let
  nixos = import ./nixos.nix { inherit lib nixpkgs; };
  inherit (nixos) evaluate;

  # A configuration of layered stores, and what becomes of it.
  withStores = stores: evaluate [ (layered { inherit stores; }) ];
  layered = settings: { services.layeredStores = settings // { enable = true; }; };

  tests =
    import ./scenarios.nix { inherit lib evaluate; }
    // import ./values.nix { inherit lib evaluate withStores layered; }
    // import ./units.nix { inherit lib evaluate layered; }
    // lib.mapAttrs' (
      name: refusal:
      lib.nameValuePair "test refused: ${name}" {
        expr = (evaluate [ refusal.configuration ]).failures;
        expected = refusal.messages;
      }
    ) refusals
    // import ./documentation.nix { inherit lib options; };
  refusals = import ./refusals.nix { inherit lib layered; };
  failures = lib.runTests tests;

  # The module's options, without those of NixOS.
  inherit
    (lib.evalModules {
      modules = [
        ../../module/options.nix
        { _module.args = { inherit (nixos) pkgs; }; }
      ];
    })
    options
    ;
in
rec {
  report = {
    inherit failures;
    tests = lib.length (lib.attrNames tests);
    # Whether the text of units was Nixpkgs' own.
    units = if nixos.real then "nixpkgs" else "stand-in";
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

  # For the scenario that boots what is rendered here, and asks the daemon's own opinion about what
  # is refused.
  machine = {
    booted = lib.getAttrs [ "toml" "units" "wants" "polkit" "uris" ] (
      import ./booted.nix { inherit lib evaluate; }
    );
    refused = lib.mapAttrs (
      _name: refusal: {
        inherit (evaluate [ refusal.configuration ]) toml;
        inherit (refusal) messages words;
      }
    ) (lib.filterAttrs (_name: refusal: refusal.daemon) refusals);
    inherit report optionReference;
  };
}
