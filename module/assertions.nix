# What neither a type nor the daemon can say, or not in time: what is wrong between stores, what
# would end the evaluation with a riddle, and what only NixOS knows. Each names its option and the
# way out.
{ config, lib, ... }:

let
  cfg = config.services.layeredStores;
  layered = import ./lib.nix { inherit lib; };
  settingsLib = import ./settings.nix { inherit lib; };
  resolved = settingsLib.resolveAll cfg.settings;
  all = lib.attrValues resolved;

  optionOf = name: option: "services.layeredStores.stores.${lib.showOption [ name ]}.${option}";
  lowerStoreOf = store: text: "${optionOf store.name "lowerStore"} = ${builtins.toJSON text}";

  # Units are called by them, and one with a '/' would not be built, in words of its own.
  names = map (name: {
    assertion = builtins.match "[a-z0-9][a-z0-9-]{0,63}" name != null;
    message =
      "services.layeredStores.stores: ${builtins.toJSON name} is no name for a store; use "
      + "lower-case letters, digits and '-', at most 64 of them, and no '-' in front";
  }) (lib.attrNames resolved);

  references = lib.concatMap (
    store:
    let
      next = store.lower.layered or null;
      chain = settingsLib.chain resolved store.name;
      place = lowerStoreOf store "layered:${next}";
    in
    lib.optionals (next != null) [
      {
        assertion = resolved ? ${next};
        message = "${place}: no store \"${next}\" is declared here; declare it, or name another";
      }
      {
        assertion = lib.allUnique chain;
        message =
          "${place}: the store lies on itself (${lib.concatStringsSep " on " chain}); "
          + "let one of them have a lower store of its own";
      }
    ]
  ) all;

  directories = lib.concatMap (
    store:
    lib.mapAttrsToList (option: path: {
      inherit path;
      option = optionOf store.name option;
    }) (settingsLib.written store)
  ) all;
  byPath = lib.groupBy (directory: directory.path) directories;
  shared = map (
    directory:
    let
      around = lib.concatMap (path: byPath.${path} or [ ]) (layered.ancestors directory.path);
      other = lib.findFirst (other: other != directory) null around;
    in
    {
      assertion = other == null;
      message =
        "${directory.option}: ${directory.path} is not apart from ${other.path}, which is "
        + "${other.option}; give each a directory of its own";
    }
  ) directories;

  # The configuration has no `ephemeral-size` then, and no store that is ephemeral.
  sizes = lib.mapAttrsToList (name: store: {
    assertion = store.ephemeral.enable -> cfg.settings.stores.${name} ? ephemeral-size;
    message =
      "${optionOf name "ephemeral.size"}: an ephemeral store needs a size, or it could fill the "
      + "memory; set it, for example to \"2G\"";
  }) cfg.stores;

  throughDaemon = map (store: {
    assertion = store.lower.throughDaemon or false -> config.nix.enable;
    message =
      "${lowerStoreOf store store.lower.url}: the store underneath is reached through this machine's "
      + "Nix daemon, and nix.enable is false; set nix.enable = true, or name a store that needs no "
      + "daemon, such as \"local\"";
  }) all;

  # Whoever opens a layered store needs a Nix that can, and stores' daemons are of this one.
  nixPackage = config.nix.package;
  nixName = nixPackage.pname or (builtins.parseDrvName (nixPackage.name or "")).name;
  nixVersion = nixPackage.version or (builtins.parseDrvName (nixPackage.name or "")).version;
  # 2.26pre… is what became 2.26. A package need not say which version it is.
  nixIsTooOld = nixVersion != "" && lib.versionOlder nixVersion "2.26pre";
  nixIsUsed = config.nix.enable || lib.any (store: store.socketPath != null) all;
  nixVersions = lib.optionals nixIsUsed [
    {
      assertion = nixName != "lix";
      message =
        "nix.package is Lix ${nixVersion}, which has no local-overlay stores; "
        + "set it to a Nix, for example to pkgs.nixVersions.latest";
    }
    {
      assertion = nixName == "lix" || !nixIsTooOld;
      message =
        "nix.package is Nix ${nixVersion}, and layered stores need 2.26 or newer; "
        + "set it to a newer one, for example to pkgs.nixVersions.latest";
    }
  ];

  # A Nix expression cannot take other characters apart into the bytes that a URL escapes, and `uri`
  # would not be what the daemon prints. It refuses control characters itself.
  asciiOnly = map (store: {
    assertion = builtins.match "[ -~[:cntrl:]]*" (store.lower.url or "") != null;
    message =
      "${lowerStoreOf store store.lower.url}: it holds characters beyond ASCII; write them "
      + "percent-encoded";
  }) all;

  # Accounts. They need not be declared here: there are networks, and people with useradd(8).
  declared = {
    users = lib.mapAttrsToList (name: user: user.name or name) config.users.users;
    groups = lib.mapAttrsToList (name: group: group.name or name) config.users.groups;
  };
  local = [
    "files"
    "systemd"
    "mymachines"
  ];
  elsewhere =
    database:
    lib.any (source: !lib.any (word: lib.hasInfix word source) local) (
      config.system.nssDatabases.${database} or [ ]
    );
  comesFromElsewhere = {
    users = elsewhere "passwd";
    groups = elsewhere "group";
  };
  isNumber = name: builtins.match "[0-9]+" name != null;

  # Every account that a store names: { option, kind, account }.
  accounts = lib.concatLists (
    lib.mapAttrsToList (
      name: store:
      let
        named =
          kind: option:
          map (account: {
            inherit kind account;
            option = optionOf name option;
          });
        member = account: lib.hasPrefix "@" account;
        both =
          option: list:
          named "users" option (lib.filter (account: !member account) list)
          ++ named "groups" option (map (lib.removePrefix "@") (lib.filter member list));
      in
      both "owner" (lib.optional (store.owner != null) store.owner)
      ++ named "groups" "group" (lib.optional (store.group != null) store.group)
      ++ named "users" "remountUsers" store.remountUsers
      ++ named "groups" "remountGroups" store.remountGroups
      ++ lib.optionals store.daemon.enable (
        both "daemon.allowedUsers" store.daemon.allowedUsers
        ++ named "groups" "daemon.allowedGroups" store.daemon.allowedGroups
        ++ both "daemon.trustedUsers" store.daemon.trustedUsers
      )
    ) cfg.stores
  );
  unknown = lib.filter (
    { kind, account, ... }:
    account != "*"
    && account != "root"
    && !isNumber account
    && !comesFromElsewhere.${kind}
    && !lib.elem account declared.${kind}
  ) accounts;
  what = {
    users = "user";
    groups = "group";
  };
  notDeclared =
    { option, kind, account }:
    "${option}: there is no ${what.${kind}} ${builtins.toJSON account} in this configuration; "
    + "declare it in users.${kind}, or name another";
  # Without its owner a store does not come up. With only declared accounts on the machine, that is
  # certain.
  certain =
    { option, ... }:
    !config.users.mutableUsers && (lib.hasSuffix ".owner" option || lib.hasSuffix ".group" option);
in
{
  config = lib.mkIf cfg.enable {
    assertions =
      names
      ++ references
      ++ shared
      ++ sizes
      ++ throughDaemon
      ++ nixVersions
      ++ asciiOnly
      ++ map (account: {
        assertion = !certain account;
        message = notDeclared account;
      }) unknown;

    warnings = map notDeclared (lib.filter (account: !certain account) unknown);
  };
}
