# The keys of the configuration as options of a store, and the configuration that follows from them.
#
# For each key there is here what is NixOS' own: the type, and the value that means that nothing was
# said. Names and descriptions are in keys.json, which is made from the daemon's own table of keys
# (crates/model/src/declaration.rs, nix_daemon.rs).
{ lib }:

let
  inherit (lib) mkOption types;
  layered = import ./lib.nix { inherit lib; };
  words = builtins.fromJSON (builtins.readFile ./keys.json);

  # As a string, or as Nix writes a path. Nixpkgs 24.05 has no types.externalPath.
  outside = path: lib.hasPrefix "/" path && !lib.hasPrefix "${builtins.storeDir}/" path;
  path = types.coercedTo types.path toString (types.addCheck types.str outside) // {
    description = "absolute path outside of the Nix store";
    descriptionClass = "noun";
  };

  mode = types.strMatching "[0-7]{3,4}" // {
    description = "mode of three or four octal digits";
    descriptionClass = "noun";
  };

  size = types.strMatching "0*[1-9][0-9]*[KMGT]?|([1-9][0-9]?|100)%" // {
    description = "size (\"2G\", \"25%\")";
    descriptionClass = "noun";
  };

  # What a nix.conf(5) can hold.
  nixSetting = types.oneOf [
    types.bool
    types.int
    types.str
    (types.listOf types.str)
  ];

  nullOr = type: {
    type = types.nullOr type;
    default = null;
  };
  flag = {
    type = types.bool;
    default = true;
  };

  # Beside what is given to `mkOption`: `more` is said on NixOS only, and `value` is what becomes of
  # a store's options if that is not just the one.
  keys =
    name:
    let
      directory = tail: {
        type = path;
        default = layered.defaultDirectory name tail;
        defaultText = layered.defaultDirectory "‹name›" tail;
      };
    in
    {
      lower-store = nullOr (types.coercedTo types.path toString types.str) // {
        more = "It has to be named, here or in {option}`services.layeredStores.settings`.";
      };
      root = directory "root";
      upper-layer = directory "upper";
      work-dir = directory "work";
      owner = nullOr types.str;
      group = nullOr types.str;
      mode = nullOr mode;
      autostart = flag;
      required = flag;
      leases = {
        type = types.enum [
          "used"
          "all"
          "none"
        ];
        default = "used";
      };
      mount-options = {
        type = types.listOf (
          types.enum [
            "noatime"
            "nodiratime"
            "relatime"
            "strictatime"
            "noexec"
          ]
        );
        default = [ ];
      };
      ephemeral-size = nullOr (types.coercedTo types.ints.positive toString size) // {
        more = "It has to be given with {option}`ephemeral.enable`.";
      };
      "daemon.socket-path" = {
        type = path;
        default = layered.defaultSocketPath name;
        defaultText = layered.defaultSocketPath "‹name›";
      };
      "daemon.socket-mode" = {
        type = mode;
        default = "0666";
      };
      "daemon.allowed-users" = {
        type = types.listOf types.str;
        default = [ ];
        example = [ "alice" ];
        more = ''
          Groups can be named in {option}`daemon.allowedGroups` as well. If neither of the two
          names anybody, nobody but {option}`daemon.trustedUsers` may.
        '';
        # The daemon's own default lets everybody in. Whoever names nobody has not thought about it,
        # and then nobody but the trusted users is let in.
        value =
          { daemon, ... }:
          let
            named = daemon.allowedUsers ++ map (group: "@${group}") daemon.allowedGroups;
          in
          if named == [ ] then daemon.trustedUsers else named;
      };
      "daemon.trusted-users" = {
        type = types.listOf types.str;
        default = [ "root" ];
      };
      "daemon.settings" = {
        type = types.attrsOf nixSetting;
        default = { };
        more = "The machine's own are {option}`nix.settings`.";
      };
    };

  optionPath = key: lib.splitString "." (lib.head words.${key}.options);
  keyPath = lib.splitString ".";
  merge = lib.foldl' lib.recursiveUpdate { };

  describe =
    key: said:
    let
      inherit (words.${key}) default description;
      # Behind a list begins another paragraph.
      separator = if lib.hasInfix "\n" description then "\n\n" else " ";
      isAbsence = said.default == null && !lib.hasPrefix "none" default;
    in
    lib.concatStringsSep separator (
      [ description ]
      ++ lib.optional isAbsence "`null` is ${default}."
      ++ lib.optional (said ? more) said.more
    );

  option =
    key: said:
    mkOption (
      {
        inherit (words.${key}) example;
        description = describe key said;
      }
      // removeAttrs said [
        "more"
        "value"
      ]
    );
in
{
  inherit words;

  # The options of a store that are keys.
  options =
    name:
    let
      entry = key: said: lib.setAttrByPath (optionPath key) (option key said);
    in
    merge (lib.mapAttrsToList entry (keys name));

  # The table of a store. What holds without being said is left out, so that a configuration says no
  # more than its author did.
  table =
    name: store:
    let
      entry =
        key: said:
        let
          path = optionPath key;
          value = if said ? value then said.value store else lib.getAttrFromPath path store;
          # `ephemeral.size` says nothing without `ephemeral.enable`, and so it is with `daemon`.
          isInForce = lib.length path == 1 || store.${lib.head path}.enable;
        in
        lib.optionalAttrs (isInForce && (said ? value || value != said.default)) (
          lib.setAttrByPath (keyPath key) value
        );
    in
    merge (lib.mapAttrsToList entry (keys name));
}
