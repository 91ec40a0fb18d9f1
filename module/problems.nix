# What the daemon would refuse in a configuration, as far as it can be seen without the machine
# (src/config.rs, src/store/stack.rs), in the daemon's own words.
#
# Settings in, a list of { store, key, value, sentence } out. `key` is a path of keys below the
# store's table, joined with dots; null where the store itself is at fault, and `store` is null for
# what is outside of stores. `value` is null where there is none to show.
{ lib }:

let
  inherit (builtins)
    elemAt
    match
    stringLength
    toJSON
    typeOf
    ;
  layered = import ./lib.nix { inherit lib; };
  settingsLib = import ./settings.nix { inherit lib; };
  inherit (layered)
    ancestors
    nameProblem
    pathProblem
    ;

  article =
    value:
    let
      name =
        {
          bool = "boolean";
          int = "integer";
          list = "array";
          set = "table";
          string = "string";
        }
        .${typeOf value} or (typeOf value);
    in
    "${if lib.elem name [ "integer" "array" ] then "an" else "a"} ${name}";

  # The name that this begins, or the nearest, for a slip of the finger; the first of several.
  didYouMean =
    otherwise: names: name:
    let
      # Of two letters, one may be wrong.
      most = lib.min 2 (stringLength name / 2);
      begun = lib.filter (lib.hasPrefix "${name}-") names;
      near = lib.filter (lib.strings.levenshteinAtMost most name) names;
      nearest = lib.foldl' (
        best: other:
        if best == null || distance other < distance best then other else best
      ) null near;
      distance = lib.strings.levenshtein name;
    in
    if begun != [ ] then
      "did you mean \"${lib.head begun}\"?"
    else if near == [ ] then
      otherwise
    else
      "did you mean \"${nearest}\"?";

  # Checks of one value: null, or what is wrong with it.
  text = check: value: if lib.isString value then check value else expected "a string" value;
  expected = what: value: "${what} is expected here, not ${article value}";
  flag = value: if lib.isBool value then null else expected "true or false" value;
  texts =
    check: value:
    if !lib.isList value then
      expected "a list of strings" value
    else
      lib.findFirst (problem: problem != null) null (map (text check) value);

  account =
    value:
    if match "[a-zA-Z0-9_.$][a-zA-Z0-9_.$-]*" value == null then
      "not the name or number of an account"
    else
      null;

  # Whom Nix lets in: `allowed-users` and `trusted-users` of nix.conf(5).
  nixUser =
    value:
    if value == "*" || match "@?[a-zA-Z0-9_.$][a-zA-Z0-9_.$-]*" value != null then
      null
    else
      "${toJSON value} is not a user's name, a group's as \"@group\", or \"*\" for everybody";

  mode =
    value:
    let
      # Leading zeros carry nothing; what is left are the digits that count.
      digits = match "0*([0-7]{0,4})" value;
      padded = lib.fixedWidthString 4 "0" (lib.head digits);
      owner = lib.substring 1 1 padded;
      everybody = lib.substring 3 1 padded;
    in
    if value == "" || digits == null then
      modeForm
    else if
      lib.elem everybody [
        "2"
        "3"
        "6"
        "7"
      ]
    then
      "everybody could write into the store; take the last digit's 2 away"
    else if owner != "7" then
      modeForm
    else
      null;
  modeForm =
    "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";

  socketMode =
    value:
    if match "[0-7]{3,4}" value == null then
      "a mode is three or four octal digits, such as \"0666\""
    else
      null;

  socketPath =
    value:
    let
      problem = pathProblem value;
    in
    if problem != null then
      problem
    else if stringLength value > layered.maxSocketPathLength then
      "the path is ${toString (stringLength value)} bytes long; "
      + "a Unix socket's has at most ${toString layered.maxSocketPathLength}"
    else
      null;

  mountOptions = [
    "noatime"
    "nodiratime"
    "relatime"
    "strictatime"
    "noexec"
  ];
  mountOption =
    value:
    if lib.elem value mountOptions then
      null
    else
      "${toJSON value} is not among the mount options that can be chosen: "
      + "${lib.concatStringsSep ", " mountOptions}";

  ephemeralSize =
    value:
    if match "0*[1-9][0-9]*[KMGT]?|([1-9][0-9]?|100)%" value == null then
      "a size is a number of bytes, with K, M, G or T behind it for powers of 1024, "
      + "or a part of the memory from \"1%\" to \"100%\""
    else
      null;

  lowerStore = value: (layered.readLowerStore value).problem or null;

  # Settings of Nix that a store's daemon is not given: the option that is meant, or why.
  nixSettings =
    let
      ours = option: "this is set with ${option}; take the setting away";
      allowed = ours "daemon.allowedUsers and daemon.allowedGroups";
      trusted = ours "daemon.trustedUsers";
      counts =
        "Nix counts wrongly how much is freed in a layered store, and would delete more than is "
        + "asked for; take the setting away";
    in
    {
      store = "the daemon is given its store by itself; take the setting away";
      experimental-features =
        "what the store needs is set by itself; name further ones with extra-experimental-features";
      allowed-users = allowed;
      extra-allowed-users = allowed;
      trusted-users = trusted;
      extra-trusted-users = trusted;
      min-free = counts;
      max-free = counts;
    };
  nixSetting =
    key: value:
    if nixSettings ? ${key} then
      nixSettings.${key}
    else if match "[a-z0-9-]+" key == null then
      "the name of a Nix setting has lower-case letters, digits and '-' only"
    else if key == "auto-optimise-store" && value != false then
      "it would replace files of the upper layer by hard links; set it to false, or take it away"
    else if lib.isList value then
      texts (line "each of these") value
    else if lib.isString value then
      line "the value" value
    else if lib.isInt value || lib.isBool value then
      null
    else
      expected "a string, an integer, true, false or a list of strings" value;
  line =
    what: value:
    if lib.hasInfix "\n" value then
      "${what} has to be one line; take the line break away"
    else if layered.holdsControl value then
      "${what} holds a control character; take it away"
    else
      null;

  keys = {
    "lower-store" = text lowerStore;
    root = text pathProblem;
    "upper-layer" = text pathProblem;
    "work-dir" = text pathProblem;
    owner = text account;
    group = text account;
    mode = text mode;
    required = flag;
    autostart = flag;
    "mount-options" = texts mountOption;
    "ephemeral-size" = text ephemeralSize;
    daemon = value: if lib.isAttrs value then null else expected "a table" value;
  };
  # As the daemon names them.
  keyOrder = [
    "lower-store"
    "root"
    "upper-layer"
    "work-dir"
    "owner"
    "group"
    "mode"
    "required"
    "autostart"
    "mount-options"
    "ephemeral-size"
    "daemon"
  ];
  daemonKeyOrder = [
    "socket-path"
    "socket-mode"
    "allowed-users"
    "trusted-users"
    "settings"
  ];
  daemonKeys = {
    socket-path = text socketPath;
    socket-mode = text socketMode;
    allowed-users = texts nixUser;
    trusted-users = texts nixUser;
    settings = value: if lib.isAttrs value then null else expected "a table" value;
  };

  # What is wrong in a table, by the checks of its keys.
  inTable =
    store: prefix: order: checks: table:
    lib.concatLists (
      lib.mapAttrsToList (
        key: value:
        let
          sentence = (checks.${key} or unknown) value;
          unknown =
            _value:
            "unknown key \"${prefix}${key}\"; "
            + didYouMean "the keys are ${lib.concatStringsSep ", " order}" order key;
        in
        lib.optional (sentence != null) {
          inherit store sentence;
          key = prefix + key;
          # A value of another type, or of a key that is none, explains nothing.
          value =
            if checks ? ${key} && lib.isString value && !lib.hasInfix " is expected here" sentence then
              value
            else
              null;
        }
      ) table
    );

  inStore =
    name: table:
    let
      nameWrong = nameProblem name;
      about = key: value: sentence: {
        store = name;
        inherit key value sentence;
      };
      daemon = table.daemon or { };
      nix = daemon.settings or { };
    in
    if !lib.isAttrs table then
      [ (about null null (expected "a table" table)) ]
    else
      lib.optional (nameWrong != null) (about null null nameWrong)
      ++ lib.optional (!table ? lower-store) (
        about "lower-store" null
          "key \"lower-store\" is missing; name the store underneath, for example \"daemon\""
      )
      ++ inTable name "" keyOrder keys table
      ++ lib.optionals (table ? ephemeral-size) (
        map
          (
            key:
            about key table.${key} (
              "an ephemeral store has all of its directories on a filesystem of its own; "
              + "take this away, or ephemeral-size"
            )
          )
          (
            lib.filter (key: table ? ${key}) [
              "root"
              "upper-layer"
              "work-dir"
            ]
          )
      )
      ++ lib.optionals (lib.isAttrs daemon) (
        inTable name "daemon." daemonKeyOrder daemonKeys daemon
        ++ lib.optionals (lib.isAttrs nix) (
          lib.concatLists (
            lib.mapAttrsToList (
              key: value:
              let
                sentence = nixSetting key value;
              in
              lib.optional (sentence != null) (about "daemon.settings.${key}" null sentence)
            ) nix
          )
        )
      );

  ofStore = name: other: if name == other then "the same store" else "store \"${other}\"";

  # What is wrong between stores. They are all sound by themselves.
  betweenStores =
    stores:
    let
      about = store: key: value: sentence: {
        inherit
          store
          key
          value
          sentence
          ;
      };
      all = lib.attrValues stores;
      lowerText =
        store: if store.lower ? layered then "layered:${store.lower.layered}" else store.lower.url;

      references = lib.concatMap (
        store:
        let
          names = settingsLib.chain stores store.name;
          last = lib.last names;
          say = sentence: [ (about store.name "lower-store" (lowerText store) sentence) ];
          path = lib.concatStringsSep " on " names;
          next = store.lower.layered or null;
        in
        if next != null && !stores ? ${next} then
          say (
            "no store \"${next}\" is declared here; "
            + didYouMean "declare it, or name another" (lib.attrNames stores) next
          )
        else if !lib.allUnique names then
          say "the store lies on itself (${path}); let one of them have a lower store of its own"
        else if !stores ? ${last} then
          # Only the store that names it is told.
          [ ]
        else if lib.length names > 2 then
          say (
            "the kernel stacks at most 2 overlays and this would be number "
            + "${toString (lib.length names)} (${path}); "
            + "use the lower store of ${elemAt names 1} instead"
          )
        else if next != null && stores.${next}.owner != store.owner then
          say (
            "the store \"${next}\" belongs to ${stores.${next}.owner} and this one to ${store.owner}, "
            + "and Nix opens both as one user; give both the same owner"
          )
        else
          [ ]
      ) all;

      # Every directory that a store writes, as the daemon sorts them.
      written = lib.concatMap (
        store:
        let
          entry = key: path: {
            inherit key path;
            store = store.name;
          };
        in
        if store.ephemeral then
          [ (entry "ephemeral-size" store.directory) ]
        else
          [
            (entry "root" store.root)
            (entry "upper-layer" store.upperLayer)
            (entry "work-dir" store.workDir)
          ]
      ) all;
      byPath = lib.groupBy (entry: entry.path) written;
      noun = key: if key == "ephemeral-size" then "filesystem" else key;
      overlap =
        relation: entry: key: owner: path:
        about entry.store entry.key (if entry.key == "ephemeral-size" then null else entry.path) (
          "it ${relation} the ${key} of ${ofStore entry.store owner} (${path}); "
          + "give each a directory of its own"
        );
      nearest = found: path: lib.findFirst (dir: found ? ${dir}) null (ancestors path);
      overlaps = lib.concatMap (
        entries:
        lib.concatLists (
          lib.imap0 (
            index: entry:
            let
              above = nearest byPath (dirOf entry.path);
              outer = lib.last byPath.${above};
              twin = elemAt entries (index - 1);
            in
            if index > 0 then
              [ (overlap "is also" entry (noun twin.key) twin.store twin.path) ]
            else if above != null then
              [ (overlap "lies inside" entry (noun outer.key) outer.store outer.path) ]
            else
              [ ]
          ) entries
        )
      ) (lib.attrValues byPath);

      onPlain = lib.filter (store: store.lower ? dir) all;
      byRealStoreDir = lib.groupBy (store: store.realStoreDir) all;
      lowerInside = lib.concatMap (
        store:
        let
          inherit (store.lower) dir;
          others = lib.filter (other: other.name != store.name) (byRealStoreDir.${dir} or [ ]);
          around = nearest byPath dir;
          outer = lib.last byPath.${around};
          say = sentence: [ (about store.name "lower-store" store.lower.url sentence) ];
        in
        if others != [ ] then
          let
            inherit (lib.head others) name;
          in
          say "this is the store \"${name}\" of this configuration; write \"layered:${name}\""
        else if around != null then
          say (
            "the lower store's directory ${dir} lies inside the ${noun outer.key} of "
            + "${ofStore store.name outer.store} (${outer.path}); a lower store has to lie apart"
          )
        else
          [ ]
      ) onPlain;

      byLowerDir = lib.groupBy (store: store.lower.dir) onPlain;
      insideLower = lib.concatMap (
        entry:
        let
          around = nearest byLowerDir entry.path;
          owner = (lib.head byLowerDir.${around}).name;
          relation = if around == entry.path then "is also" else "lies inside";
        in
        lib.optional (around != null) (overlap relation entry "lower store's directory" owner around)
      ) written;

      derived = lib.concatMap (
        store:
        let
          sentences =
            lib.concatMap
              (
                tail:
                let
                  problem = pathProblem "${store.root}/${tail}";
                in
                lib.optional (problem != null) "with ${tail} below it: ${problem}"
              )
              [
                "nix/store"
                "nix/var/nix"
              ];
          length = stringLength store.mountUnit;
          tooLong =
            "the mount unit for ${store.realStoreDir} would have a name of ${toString length} bytes, "
            + "and systemd takes ${toString layered.maxUnitNameLength}; "
            + "use a shorter path, or one with fewer '-' (each counts four)";
          all = sentences ++ lib.optional (length > layered.maxUnitNameLength) tooLong;
        in
        lib.optional (all != [ ]) (about store.name "root" store.root (lib.head all))
      ) all;

      sockets = lib.concatMap (
        entries:
        map (
          store:
          about store.name "daemon.socket-path" store.socketPath (
            "it is also the socket of store \"${(lib.head entries).name}\"; give each a socket of its own"
          )
        ) (lib.tail entries)
      ) (
        lib.attrValues (
          lib.groupBy (store: store.socketPath) (lib.filter (store: store.socketPath != null) all)
        )
      );
    in
    references ++ derived ++ overlaps ++ lowerInside ++ insideLower ++ sockets;
in
settings:
let
  tables = settings.stores or { };
  top = inTable null "" [ "stores" ] {
    stores = value: if lib.isAttrs value then null else expected "a table" value;
  } settings;
  each = lib.optionalAttrs (lib.isAttrs tables) (lib.mapAttrs inStore tables);
  sound = lib.filterAttrs (name: _store: each.${name} == [ ]) (settingsLib.resolveAll settings);
  # Whether a name that a store refers to is there has nothing to do with mistakes in its table.
  unsound = lib.filterAttrs (name: _store: each.${name} != [ ]) (settingsLib.resolveAll settings);
  missing =
    problem:
    problem.key == "lower-store"
    && problem.value != null
    && lib.hasPrefix "layered:" problem.value
    && unsound ? ${lib.removePrefix "layered:" problem.value};
in
top ++ lib.concatLists (lib.attrValues each) ++ lib.filter (p: !missing p) (betweenStores sound)
