# NixOS, evaluated: all of it, or the parts that have to do with the module. Nothing is built.
{
  nixpkgs,
  lib,
  pkgs,
}:

let
  toml = import ./toml.nix { inherit lib; };

  # What a Debian has in /usr, so that units rendered here work there.
  installed =
    name: version:
    let
      self = {
        type = "derivation";
        name = "${name}-${version}";
        pname = name;
        inherit version;
        outPath = "/usr";
        outputName = "out";
        out = self;
        meta = { };
        # Another version of it, somewhere else.
        overrideAttrs = _change: self // { outPath = "/opt"; out = self // { outPath = "/opt"; }; };
      };
    in
    self;

  onDebian = {
    nix.package = lib.mkDefault (installed "nix" "2.26.3");
    services.layeredStores.package = lib.mkDefault (installed "layered-stores" "0");
  };

  base = {
    imports = [ "${nixpkgs}/nixos/modules/misc/nixpkgs/read-only.nix" ];
    nixpkgs.pkgs = pkgs;
    system.stateVersion = lib.trivial.release;
    boot.loader.grub.enable = false;
    fileSystems."/".device = "/dev/vda";
    # Its text is what is built, and takes a file that is no part of the modules.
    documentation.nixos.enable = false;
  };
  system = import "${nixpkgs}/nixos/lib/eval-config.nix" {
    inherit lib;
    system = null;
    modules = [
      ../../module
      base
    ];
  };

  # The modules of NixOS whose options the module reads and sets, for what is evaluated a hundred
  # times: all of NixOS takes forty times as long.
  concerned = lib.evalModules {
    class = "nixos";
    modules = [
      ../../module
      {
        # What these modules say to others.
        _module.check = false;
        _module.args = {
          inherit pkgs;
          utils = import "${nixpkgs}/nixos/lib/utils.nix" {
            inherit lib pkgs;
            inherit (concerned) config;
          };
        };
        environment.extraOutputsToInstall = [ ];
      }
    ]
    ++ map (module: "${nixpkgs}/nixos/modules/${module}.nix") [
      "config/networking"
      "config/nix"
      "config/nix-remote-build"
      "config/nsswitch"
      "config/system-path"
      "config/users-groups"
      "misc/assertions"
      "misc/ids"
      "programs/ssh"
      "security/ca"
      "security/polkit"
      "services/system/dbus"
      "services/system/nix-daemon"
      "system/boot/systemd"
      "system/etc/etc"
    ];
  };

  ours = file: lib.hasPrefix (toString ../../module) (toString file);
  # What the module itself says, among all that is said by others.
  said =
    option:
    map (definition: definition.value) (
      lib.filter (definition: ours definition.file) option.definitionsWithLocations
    );

  # Where a value cannot be evaluated.
  untyped =
    path: value:
    let
      isWhole = (builtins.tryEval (builtins.deepSeq value null)).success;
      isSet = builtins.tryEval (lib.isAttrs value);
    in
    if isWhole then
      [ ]
    else if isSet.success && isSet.value then
      lib.concatLists (lib.mapAttrsToList (name: untyped (path ++ [ name ])) value)
    else
      [ (lib.showOption path) ];

  # What of an evaluated system is the module's, as files.
  files =
    config:
    let
      units = lib.filterAttrs (name: _unit: lib.hasPrefix "layered-" name) config.systemd.units;
    in
    {
      toml = toml config.services.layeredStores.settings;
      # As they lie in /etc/systemd/system.
      units = lib.mapAttrs' (
        name: unit:
        lib.nameValuePair (
          if unit.overrideStrategy == "asDropin" then "${name}.d/overrides.conf" else name
        ) unit.text
      ) units;
      wants = lib.concatLists (
        lib.mapAttrsToList (name: unit: map (wants: "${wants}.wants/${name}") unit.wantedBy) units
      );
    };

  result =
    evaluated:
    let
      inherit (evaluated) config options;
    in
    files config
    // {
      inherit config options;
      said = builtins.mapAttrs (_name: said) {
        inherit (options.environment) etc systemPackages;
        inherit (options.services.dbus) packages;
        inherit (options.security.polkit) extraConfig;
        inherit (options.systemd) services targets;
        systemd = options.systemd.packages;
      };
      failures = map (a: a.message) (
        lib.filter (a: !a.assertion) (lib.concatLists (said options.assertions))
      );
      warnings = lib.concatLists (said options.warnings);
      # The options of stores whose types do not take what they are given.
      untyped = lib.concatLists (
        lib.mapAttrsToList (
          name: store:
          map (option: "services.layeredStores.stores.${name}.${option}") (
            untyped [ ] (
              # What follows from the others.
              removeAttrs store [
                "uri"
                "realStoreDir"
                "mountUnit"
              ]
            )
          )
        ) config.services.layeredStores.stores
      );
      inherit (config.services.layeredStores) settings;
    };
in
{
  inherit onDebian installed files;

  # Modules beside those that are concerned, with what Debian has in the place of packages.
  evaluate = modules: result (concerned.extendModules { modules = [ onDebian ] ++ modules; });

  # The same in all of NixOS, and with packages that could be built.
  evaluateSystem = modules: result (system.extendModules { inherit modules; });
}
