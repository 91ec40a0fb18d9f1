# As much of NixOS as the module needs to be evaluated: the option declarations it writes to, and
# packages that are names only. Nothing here can be built.
#
# With a checkout of Nixpkgs the declarations of systemd's units and the text of those units are
# Nixpkgs' own. With its library alone they are those of systemd.nix: the types that Nixpkgs
# documents, and the same text.
{
  nixpkgs,
  lib,
}:

let
  inherit (lib) mkOption types;

  # A package or a file that was "built": its path tells what is in it, as a store path does.
  built =
    name: inputs:
    let
      hash = lib.substring 0 32 (builtins.hashString "sha256" (builtins.toJSON inputs));
    in
    {
      type = "derivation";
      inherit name;
      outPath = "/nix/store/${hash}-${name}";
    };

  # What a Debian has in /usr, so that units rendered here work there.
  installed = name: {
    type = "derivation";
    inherit name;
    outPath = "/usr";
    # Another version of it, somewhere else.
    overrideAttrs = _change: installed name // { outPath = "/opt"; };
  };

  # TOML, of which JSON's strings, numbers and arrays are a part.
  toml =
    let
      key = name: if builtins.match "[A-Za-z0-9_-]+" name != null then name else builtins.toJSON name;
      inline =
        value:
        if lib.isAttrs value then
          "{ ${
            lib.concatStringsSep ", " (lib.mapAttrsToList (name: v: "${key name} = ${inline v}") value)
          } }"
        else if lib.isList value then
          "[ ${lib.concatMapStringsSep ", " inline value} ]"
        else
          builtins.toJSON value;
      table =
        path: value:
        let
          tables = lib.filterAttrs (_name: lib.isAttrs) value;
          others = lib.filterAttrs (_name: v: !lib.isAttrs v) value;
        in
        lib.optionalString (path != [ ]) "[${lib.concatMapStringsSep "." key path}]\n"
        + lib.concatStrings (lib.mapAttrsToList (name: v: "${key name} = ${inline v}\n") others)
        + lib.concatStrings (lib.mapAttrsToList (name: table (path ++ [ name ])) tables);
    in
    table [ ];
  tomlValue =
    types.oneOf [
      types.bool
      types.int
      types.float
      types.str
      (types.attrsOf tomlValue)
      (types.listOf tomlValue)
    ]
    // {
      description = "TOML value";
    };

  pkgs = {
    formats.toml =
      { }:
      {
        type = types.attrsOf tomlValue;
        generate =
          name: value: built name value // { text = toml value; };
      };
    runCommand =
      name: _environment: script:
      built name script // { inherit script; };
    writeText = name: text: built name text // { inherit text; };
    stdenv = {
      buildPlatform.canExecute = _platform: true;
      hostPlatform = { };
    };
  }
  // lib.genAttrs [
    "acl"
    "attr"
    "coreutils"
    "dbus"
    "e2fsprogs"
    "findutils"
    "gnugrep"
    "gnused"
    "jq"
    "layered-stores"
    "nix"
    "openssh"
    "psmisc"
    "python3"
    "strace"
    "systemd"
  ] installed;

  real =
    nixpkgs != null
    && lib.all (file: builtins.pathExists (nixpkgs + "/nixos/lib/${file}")) [
      "utils.nix"
      "systemd-lib.nix"
      "systemd-types.nix"
      "systemd-unit-options.nix"
    ];

  systemdOf =
    config:
    if real then
      (import (nixpkgs + "/nixos/lib/utils.nix") { inherit lib config pkgs; }).systemdUtils
    else
      import ./systemd.nix { inherit lib pkgs; };

  any =
    description: default:
    mkOption {
      type = types.anything;
      inherit default description;
    };

  # Declarations of what others than systemd do with what the module says.
  declarations =
    { config, ... }:
    let
      systemd = systemdOf config;
    in
    {
      options = {
        assertions = mkOption {
          type = types.listOf types.attrs;
          default = [ ];
        };
        warnings = mkOption {
          type = types.listOf types.str;
          default = [ ];
        };

        systemd = {
          package = mkOption {
            type = types.package;
            default = pkgs.systemd;
          };
          packages = mkOption {
            type = types.listOf types.package;
            default = [ ];
          };
          services = mkOption {
            type = systemd.types.services;
            default = { };
          };
          targets = mkOption {
            type = systemd.types.targets;
            default = { };
          };
          globalEnvironment = any "Variables of all units." { };
          enableStrictShellChecks = any "Whether scripts are checked." false;
          tmpfiles = any "Temporary files." { };
        };

        environment = {
          systemPackages = mkOption {
            type = types.listOf types.package;
            default = [ ];
          };
          etc = mkOption {
            type = types.attrsOf (
              types.submodule {
                options = {
                  source = mkOption { type = types.package; };
                  mode = mkOption {
                    type = types.str;
                    default = "symlink";
                  };
                };
              }
            );
            default = { };
          };
        };

        security.polkit = {
          enable = mkOption {
            type = types.bool;
            default = false;
          };
          extraConfig = mkOption {
            type = types.lines;
            default = "";
          };
        };

        services.dbus.packages = mkOption {
          type = types.listOf types.path;
          default = [ ];
        };

        nix = {
          enable = mkOption {
            type = types.bool;
            default = true;
          };
          package = mkOption {
            type = types.package;
            default = pkgs.nix;
          };
          envVars = mkOption {
            type = types.attrs;
            default = { };
          };
          settings = any "nix.conf." { };
        };

        programs.ssh.package = mkOption {
          type = types.package;
          default = pkgs.openssh;
        };

        users = {
          mutableUsers = mkOption {
            type = types.bool;
            default = true;
          };
          users = any "Users." { };
          groups = any "Groups." { };
        };

        system.nssDatabases = any "Where accounts come from." {
          passwd = [ "files" ];
          group = [ "files" ];
        };

        # What only virtual machines have.
        virtualisation = any "The virtual machine." { };
        specialisation = mkOption {
          type = types.attrsOf (
            types.submodule { options.configuration = mkOption { type = types.unspecified; }; }
          );
          default = { };
        };
      };
    };
in
{
  inherit pkgs real;

  # Evaluates NixOS modules. The result has the text of the units as well.
  evaluate =
    modules:
    let
      evaluated = lib.evalModules {
        modules = [
          declarations
          { _module.args = { inherit pkgs; }; }
          ../../module
        ]
        ++ modules;
      };
      inherit (evaluated) config;
      systemd = systemdOf config;
      file =
        suffix: toUnit: name: unit:
        let
          rendered = toUnit (unit // { name = "${name}.${suffix}"; });
        in
        {
          name =
            if unit.overrideStrategy == "asDropin" then
              "${name}.${suffix}.d/overrides.conf"
            else
              "${name}.${suffix}";
          value = rendered.text;
        };
      links =
        suffix: name: unit:
        map (wants: "${wants}.wants/${name}.${suffix}") unit.wantedBy;
      inherit (config.systemd) services targets;
    in
    {
      inherit config;
      inherit (evaluated) options;
      failures = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
      inherit (config) warnings;
      inherit (config.services.layeredStores) settings;
      toml = toml config.services.layeredStores.settings;
      units =
        lib.mapAttrs' (file "service" systemd.lib.serviceToUnit) services
        // lib.mapAttrs' (file "target" systemd.lib.targetToUnit) targets;
      wants =
        lib.concatLists (lib.mapAttrsToList (links "service") services)
        ++ lib.concatLists (lib.mapAttrsToList (links "target") targets);
    };
}
