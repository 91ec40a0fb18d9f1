# Stand-ins for what Nixpkgs knows about systemd units, for where only its library is at hand: the
# options that the module sets, typed, and the text they become.
{ lib, pkgs }:

let
  inherit (lib) mkOption types;

  value = types.oneOf [
    types.bool
    types.int
    types.float
    types.str
    types.package
  ];
  section = types.attrsOf (types.either value (types.listOf value));
  unitName = types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](service|socket|mount|target)";
  list =
    type:
    mkOption {
      inherit type;
      default = [ ];
    };
  boolean =
    default:
    mkOption {
      type = types.bool;
      inherit default;
    };

  unit = {
    options = {
      enable = boolean true;
      overrideStrategy = mkOption {
        type = types.enum [
          "asDropinIfExists"
          "asDropin"
        ];
        default = "asDropinIfExists";
      };
      description = mkOption {
        type = types.singleLineStr;
        default = "";
      };
      documentation = list (types.listOf types.str);
      wantedBy = list (types.listOf unitName);
      requires = list (types.listOf unitName);
      wants = list (types.listOf unitName);
      after = list (types.listOf unitName);
      before = list (types.listOf unitName);
      reloadTriggers = list (types.listOf types.unspecified);
      restartTriggers = list (types.listOf types.unspecified);
      unitConfig = mkOption {
        type = section;
        default = { };
      };
    };
  };

  service =
    { config, ... }:
    {
      imports = [ unit ];
      options = {
        environment = mkOption {
          type = types.attrsOf (types.nullOr (types.either types.str types.package));
          default = { };
        };
        path = list (types.listOf (types.either types.package types.str));
        serviceConfig = mkOption {
          type = section;
          default = { };
        };
        restartIfChanged = boolean true;
        stopIfChanged = boolean true;
      };
      config = {
        path = lib.mkAfter [
          pkgs.coreutils
          pkgs.findutils
          pkgs.gnugrep
          pkgs.gnused
          pkgs.systemd
        ];
        environment.PATH = "${lib.makeBinPath config.path}:${
          lib.makeSearchPathOutput "bin" "sbin" config.path
        }";
      };
    };

  lines =
    section:
    lib.concatStrings (
      lib.mapAttrsToList (
        name: value:
        lib.concatMapStrings (value: "${name}=${text value}\n") (lib.toList value)
      ) section
    );
  text = value: if lib.isBool value then lib.boolToString value else toString value;

  unitSection =
    unit:
    let
      words = lib.filterAttrs (_name: value: value != "") {
        Description = unit.description;
        Documentation = toString unit.documentation;
        Requires = toString unit.requires;
        Wants = toString unit.wants;
        After = toString unit.after;
        Before = toString unit.before;
        X-Reload-Triggers = triggers "Reload" unit.reloadTriggers;
        X-Restart-Triggers = triggers "Restart" unit.restartTriggers;
      };
      triggers =
        kind: list:
        lib.optionalString (list != [ ]) "${pkgs.writeText "X-${kind}-Triggers" (toString list)}";
    in
    "[Unit]\n${lines (words // unit.unitConfig)}";

  install =
    unit:
    lib.optionalString (unit.wantedBy != [ ]) "\n[Install]\nWantedBy=${toString unit.wantedBy}\n";
in
{
  types = {
    services = types.attrsOf (types.submodule service);
    targets = types.attrsOf (types.submodule unit);
  };

  lib = {
    targetToUnit = unit: { text = unitSection unit; };
    serviceToUnit = unit: {
      text =
        unitSection unit
        + "\n[Service]\n"
        + lib.concatStrings (
          lib.mapAttrsToList (
            name: value: "Environment=${builtins.toJSON "${name}=${value}"}\n"
          ) unit.environment
        )
        + lib.optionalString (!unit.restartIfChanged) "X-RestartIfChanged=false\n"
        + lib.optionalString (!unit.stopIfChanged) "X-StopIfChanged=false\n"
        + lines unit.serviceConfig
        + install unit;
    };
  };
}
