# What would fail on the machine and can be seen before, each with its option and the way out.
{ config, lib, ... }:

let
  cfg = config.services.layeredStores;
  settingsLib = import ./settings.nix { inherit lib; };
  problems = import ./problems.nix { inherit lib; } cfg.settings;
  resolved = settingsLib.resolveAll cfg.settings;
  all = lib.attrValues resolved;

  # The option that a key of the configuration was given with. `settings` may have its own mind
  # about what `stores` declares; then that is what has to change.
  optionOf =
    name: key:
    let
      path = lib.splitString "." key;
      rendered = lib.mapAttrs settingsLib.render cfg.stores;
      value = from: lib.attrByPath ([ name ] ++ path) null from;
      # Settings of Nix are the only keys that are not ours to name.
      nix = lib.removePrefix "daemon.settings." key;
      option =
        if nix != key then
          [
            "daemon"
            "settings"
            nix
          ]
        else
          lib.splitString "." (settingsLib.options.${key} or key);
      typed =
        cfg.stores ? ${name}
        && value rendered == value cfg.settings.stores
        && (nix != key || settingsLib.options ? ${key});
      place =
        if typed then
          [
            "stores"
            name
          ]
          ++ option
        else
          [
            "settings"
            "stores"
            name
          ]
          ++ path;
    in
    show place;
  show =
    path:
    lib.showOption (
      [
        "services"
        "layeredStores"
      ]
      ++ path
    );

  explain =
    problem:
    let
      place =
        if problem.store == null then
          show [
            "settings"
            problem.key
          ]
        else if problem.key == null then
          show (lib.optional (!cfg.stores ? ${problem.store}) "settings" ++ [ "stores" problem.store ])
        else
          optionOf problem.store problem.key;
      value = lib.optionalString (problem.value != null) " = ${builtins.toJSON problem.value}";
    in
    {
      assertion = false;
      message = "${place}${value}: ${problem.sentence}";
    };

  # What a configuration without typed options could not have.
  ofOptions = lib.concatLists (
    lib.mapAttrsToList (name: store: [
      {
        assertion = store.ephemeral.enable -> cfg.settings.stores.${name} ? ephemeral-size;
        message =
          "${
            show [
              "stores"
              name
              "ephemeral"
              "size"
            ]
          }: an ephemeral store needs a size, or it could fill the memory; "
          + "set it, for example to \"2G\"";
      }
    ]) cfg.stores
  );

  throughDaemon = lib.mapAttrsToList (name: store: {
    assertion = store.lower.throughDaemon or false -> config.nix.enable;
    message =
      "${optionOf name "lower-store"} = ${builtins.toJSON (store.lower.url or "")}: the store "
      + "underneath is reached through this machine's Nix daemon, and nix.enable is false; "
      + "set nix.enable = true, or name a store that needs no daemon, such as \"local\"";
  }) resolved;

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
  # would not be what the daemon prints.
  asciiOnly = lib.mapAttrsToList (name: store: {
    assertion = builtins.match "[ -~]*" (store.lower.url or "") != null;
    message =
      "${optionOf name "lower-store"} = ${builtins.toJSON (store.lower.url or "")}: it holds "
      + "characters beyond ASCII; write them percent-encoded";
  }) resolved;

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
            option = show (
              [
                "stores"
                name
              ]
              ++ option
            );
          });
        member = account: lib.hasPrefix "@" account;
        both =
          option: list:
          named "users" option (lib.filter (account: !member account) list)
          ++ named "groups" option (map (lib.removePrefix "@") (lib.filter member list));
      in
      both [ "owner" ] (lib.optional (store.owner != null) store.owner)
      ++ named "groups" [ "group" ] (lib.optional (store.group != null) store.group)
      ++ named "users" [ "remountUsers" ] store.remountUsers
      ++ named "groups" [ "remountGroups" ] store.remountGroups
      ++ lib.optionals store.daemon.enable (
        both [
          "daemon"
          "allowedUsers"
        ] store.daemon.allowedUsers
        ++ named "groups" [
          "daemon"
          "allowedGroups"
        ] store.daemon.allowedGroups
        ++ both [
          "daemon"
          "trustedUsers"
        ] store.daemon.trustedUsers
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
      map explain problems
      ++ ofOptions
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
