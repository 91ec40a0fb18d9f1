# Every scenario is a test of NixOS that could be built. Its stores are those that it has where it
# does not run on NixOS.
{ lib, pkgs }:

let
  scenarios = import ../scenarios.nix { inherit lib; };
  evaluated = lib.mapAttrs (
    _name: scenario:
    pkgs.testers.runNixOSTest {
      imports = [ scenario ];
      defaults.nix.package = newEnough;
      # A part of Nixpkgs may be without. `python3 -m driver check` lints by the same program.
      skipLint = !builtins.pathExists (pkgs.path + "/pkgs/development/python-modules/pyflakes");
    }
  ) scenarios;
  # A Nixpkgs may have none, and this is not built.
  newEnough = lib.mkIf (lib.versionOlder pkgs.nix.version "2.26") (pkgs.nix // { version = "2.26.3"; });
  package = pkgs.callPackage ../../nix/package.nix { };
  toml = name: ../. + "/${name}.toml";
  declared =
    name:
    if builtins.pathExists (toml name) then
      builtins.fromTOML (builtins.readFile (toml name))
    else
      { stores = { }; };
  files = lib.attrNames (builtins.readDir ../.);
  named = suffix: map (lib.removeSuffix suffix) (lib.filter (lib.hasSuffix suffix) files);
  # What uses more of the Debian's driver than both have is about a system other than NixOS. And a
  # soft reboot ends the shell of NixOS' driver.
  debianOnly = [
    "softreboot"
  ]
  ++ lib.filter (name: lib.hasInfix "\nfrom driver import" (builtins.readFile (../. + "/${name}.py"))) (
    named ".py"
  );
  # And this about NixOS alone.
  nixosOnly = [ "switch" ];
in
lib.mapAttrs' (
  name: test:
  lib.nameValuePair "test scenario ${name}" {
    expr = {
      inherit (test.nodes.machine.services.layeredStores) settings;
      # The machine is a part of what this would build, and takes its assertions along.
      builds = lib.hasSuffix ".drv" test.driver.drvPath;
      inherit (test.nodes.machine) warnings;
    };
    expected = {
      settings =
        if lib.elem name nixosOnly then
          test.nodes.machine.services.layeredStores.settings
        else
          declared name;
      builds = true;
      warnings = [ ];
    };
  }
) evaluated
// {
  # What Nixpkgs' own checks of `meta` and people who review packages ask for.
  "test the package says what it is" = {
    expr = {
      inherit (package.meta)
        available
        broken
        mainProgram
        ;
      missing = lib.filter (key: package.meta.${key} or [ ] == [ ]) [
        "description"
        "homepage"
        "changelog"
        "license"
        "maintainers"
        "platforms"
      ];
      article = builtins.match "(A|An|The|[a-z]) .*|.*[.]" package.meta.description != null;
      tests = lib.attrNames package.tests;
    };
    expected = {
      available = true;
      broken = false;
      mainProgram = "layered-stores";
      missing = [ ];
      article = false;
      tests = lib.attrNames scenarios;
    };
  };
  "test every scenario has a file for NixOS" = {
    expr = lib.subtractLists (lib.attrNames scenarios ++ debianOnly) (named ".py");
    expected = [ ];
  };
}
