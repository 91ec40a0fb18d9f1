# The options say what they are for.
{
  lib,
  pkgs,
  options,
}:

let
  documented = lib.filter (option: option.visible && !option.internal) (
    lib.optionAttrSetToDocList options
  );
  ours = lib.filter (option: lib.hasPrefix "services.layeredStores" option.name) documented;
  without = what: map (option: option.name) (lib.filter (option: !option ? ${what}) ours);
  # An example adds nothing to these.
  obvious = [
    "services.layeredStores.enable"
    "services.layeredStores.stores.<name>.daemon.enable"
    "services.layeredStores.stores.<name>.ephemeral.enable"
  ];
in
{
  # Nixpkgs' own documentation of them, up to where it would be built.
  "test Nixpkgs documents every option" = {
    expr =
      let
        inherit
          (pkgs.nixosOptionsDoc {
            options = { inherit (options.services) layeredStores; };
            warningsAreErrors = true;
          })
          optionsNix
          optionsJSON
          ;
      in
      {
        builds = lib.hasSuffix ".drv" optionsJSON.drvPath;
        missing = lib.filter (option: !optionsNix ? ${option.name}) ours;
      };
    expected = {
      builds = true;
      missing = [ ];
    };
  };
  "test every option has a description" = {
    expr = map (option: option.name) (
      lib.filter (
        option: builtins.match "[A-Z][^\n]*[a-zA-Z.].*" (option.description.text or option.description or "") == null
      ) ours
    );
    expected = [ ];
  };
  "test every option has a default" = {
    expr = without "default";
    expected = [ ];
  };
  "test every option has an example" = {
    expr = lib.subtractLists obvious (without "example");
    expected = [ ];
  };
  "test the reference names every option" = {
    expr =
      let
        reference = import ../../nix/option-reference.nix { inherit lib options; };
      in
      lib.filter (option: !lib.hasInfix "`${option.name}`" reference) ours;
    expected = [ ];
  };
}
