# What can be declared.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:

let
  inherit (lib) mkOption types;
  inherit (utils.systemdUtils.unitOptions) unitOption;
  cfg = config.services.layeredStores;
  settingsLib = import ./settings.nix { inherit lib; };
  toml = pkgs.formats.toml { };
  resolved = settingsLib.resolveAll cfg.settings;

  # What a nix.conf(5) can hold.
  nixSetting = types.oneOf [
    types.bool
    types.int
    types.str
    (types.listOf types.str)
  ];

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

  daemon = name: {
    enable = lib.mkEnableOption ''
      a Nix daemon for this store: whoever may use it builds with
      `--store "$(layered-stores uri --daemon NAME)"` and needs no rights of their own.
      It is started by the first connection to its socket, which is there as long as the store is
      active'';

    socketPath = mkOption {
      type = path;
      default = settingsLib.defaultSocketPath name;
      defaultText = "/run/layered-stores/‹name›/daemon.sock";
      example = "/run/ci-store.sock";
      description = "The Unix socket on which the Nix daemon of this store listens.";
    };

    socketMode = mkOption {
      type = mode;
      default = settingsLib.defaultSocketMode;
      example = "0660";
      description = ''
        The mode of the socket, in octal digits. Nix itself decides by
        {option}`daemon.allowedUsers` and {option}`daemon.allowedGroups`; a narrower mode keeps
        others from connecting at all.
      '';
    };

    allowedUsers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "alice" ];
      description = ''
        Users who may use this store's Nix daemon; `"*"` is everybody. If neither this nor
        {option}`daemon.allowedGroups` names anybody, nobody but
        {option}`daemon.trustedUsers` may.
      '';
    };

    allowedGroups = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "ci" ];
      description = "Groups whose members may use this store's Nix daemon.";
    };

    trustedUsers = mkOption {
      type = types.listOf types.str;
      default = settingsLib.defaultTrustedUsers;
      example = [
        "root"
        "@wheel"
      ];
      description = ''
        Users, and groups as `"@group"`, whom this store's Nix daemon trusts: they may import
        what nobody has signed and change the daemon's settings for themselves. That is as good as
        being who the daemon runs as: root, or the {option}`owner` of the store, if it has one.
      '';
    };

    settings = mkOption {
      type = types.attrsOf nixSetting;
      default = { };
      example = {
        max-jobs = 2;
        substituters = [ ];
        extra-experimental-features = [ "ca-derivations" ];
      };
      description = ''
        Further settings of this store's Nix daemon, as in {manpage}`nix.conf(5)`; they win over
        {option}`nix.settings`, which holds for it as well. What a layered store needs,
        experimental features among it, is set without being asked for.
      '';
    };

    serviceConfig = mkOption {
      type = types.attrsOf unitOption;
      default = { };
      example = {
        MemoryMax = "8G";
        CPUQuota = "200%";
        TasksMax = 4096;
      };
      description = ''
        Options for the `[Service]` section of this store's Nix daemon, which is
        `layered-stores-nix-daemon@NAME.service`. They bind the daemon and all builds that it
        runs; see {manpage}`systemd.resource-control(5)`. A change restarts that daemon.

        What is to hold for the Nix daemons of all stores goes to the template instead,
        {option}`systemd.services."layered-stores-nix-daemon@".serviceConfig`. They have the
        scheduling classes, proxies and certificates of the host's daemon already.
      '';
    };
  };

  store =
    { name, ... }:
    {
      options = {
        lowerStore = mkOption {
          type = types.nullOr (types.coercedTo types.path toString types.str);
          default = null;
          example = "daemon";
          description = ''
            The store underneath, which is never written to. One of

            - `"daemon"`, this machine's own store through its Nix daemon, or `"local"`, the same
              directly;
            - the root directory of a store: the store objects of `"/srv/base"` are in
              `/srv/base/nix/store`. With `?read-only=true` behind it its database is opened
              without being written to, which takes Nix's experimental feature
              `read-only-local-store`;
            - another URL of a Nix store that has a directory on this machine;
            - `"layered:NAME"` for the store of that name here. One level of this works; the
              kernel stacks no more.

            It has to be named, here or in {option}`services.layeredStores.settings`.
          '';
        };

        root = mkOption {
          type = path;
          default = settingsLib.defaultDirectory name "root";
          defaultText = "/var/lib/layered-stores/stores/‹name›/root";
          example = "/srv/ci/root";
          description = ''
            The root of the layered store: both layers are merged in `nix/store` below it, and
            Nix's database is in `nix/var/nix`.
          '';
        };

        upperLayer = mkOption {
          type = path;
          default = settingsLib.defaultDirectory name "upper";
          defaultText = "/var/lib/layered-stores/stores/‹name›/upper";
          example = "/srv/ci/upper";
          description = ''
            The directory with what the store adds. Its filesystem needs extended attributes.
          '';
        };

        workDir = mkOption {
          type = path;
          default = settingsLib.defaultDirectory name "work";
          defaultText = "/var/lib/layered-stores/stores/‹name›/work";
          example = "/srv/ci/work";
          description = ''
            OverlayFS's scratch space. It has to be on the same mount as
            {option}`upperLayer`.
          '';
        };

        owner = mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "alice";
          description = ''
            Name or number of the user to whom upper layer and database belong; `null` is root.
            This user may have the store remounted, and build into it without a Nix daemon.
            Directories that exist are never given another owner.
          '';
        };

        group = mkOption {
          type = types.nullOr types.str;
          default = null;
          example = "builders";
          description = ''
            Name or number of their group; `null` is `nixbld` where it exists and the store is
            root's, and else the owner's.
          '';
        };

        mode = mkOption {
          type = types.nullOr mode;
          default = null;
          example = "0755";
          description = ''
            Mode of the upper layer, in octal digits; `null` is `"1775"` with a group, or with
            `nixbld` by default, and `"0755"` for others. Directories that exist are never given
            another mode.
          '';
        };

        autostart = mkOption {
          type = types.bool;
          default = true;
          example = false;
          description = ''
            Whether the store is brought up without being asked for. If not,
            `layered-stores start NAME` does.
          '';
        };

        required = mkOption {
          type = types.bool;
          default = true;
          example = false;
          description = ''
            Whether `layered-stores.target` is reached only once this store is active. A store
            that does not come up keeps no other store, and not the system, from coming up.
          '';
        };

        mountOptions = mkOption {
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
          example = [ "noatime" ];
          description = "Options of the store's mount. `nodev` and `nosuid` are always on.";
        };

        ephemeral = {
          enable = lib.mkEnableOption ''
            throwing the store's content away: all of its directories lie on a filesystem in
            memory, and are gone with the next boot'';

          size = mkOption {
            type = types.nullOr (types.coercedTo types.ints.positive toString size);
            default = null;
            example = "2G";
            description = ''
              The most that the ephemeral store may take: bytes, with `K`, `M`, `G` or `T` behind
              for powers of 1024, or a part of the memory such as `"25%"`. It has to be given
              with {option}`ephemeral.enable`.
            '';
          };
        };

        daemon = daemon name;

        remountUsers = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "alice" ];
          description = ''
            Users who may have this store remounted, by a rule for polkit. Nix's remount hook
            runs as whoever opens the store, so this is for users who open it directly. Root and
            {option}`owner` always may.
          '';
        };

        remountGroups = mkOption {
          type = types.listOf types.str;
          default = [ ];
          example = [ "ci" ];
          description = "Groups whose members may have this store remounted.";
        };

        uri = mkOption {
          type = types.str;
          readOnly = true;
          default = settingsLib.uri {
            inherit (cfg) remountHook;
            stores = resolved;
          } name;
          defaultText = lib.literalMD "what `layered-stores uri NAME` prints";
          example = "local-overlay://?root=…&lower-store=daemon&upper-layer=…&remount-hook=…";
          description = ''
            The URL under which Nix opens the store directly, as root or as
            {option}`owner`. Whoever does that needs Nix's experimental feature
            `local-overlay-store`, which is not switched on here for the whole machine: add it to
            {option}`nix.settings.extra-experimental-features`, or name it on the command line.
            Users of {option}`daemon.enable` need neither.
          '';
        };

        realStoreDir = mkOption {
          type = types.str;
          readOnly = true;
          default = resolved.${name}.realStoreDir;
          defaultText = lib.literalMD "{option}`root` with `/nix/store` behind it";
          example = "/srv/ci/root/nix/store";
          description = "Where both layers are merged.";
        };

        mountUnit = mkOption {
          type = types.str;
          readOnly = true;
          default = resolved.${name}.mountUnit;
          defaultText = lib.literalMD "the name systemd gives the mount at {option}`realStoreDir`";
          example = "srv-ci-root-nix-store.mount";
          description = ''
            The systemd unit of the store's mount. It is made while the system runs, so that a
            unit can be ordered after it (`After=`) and end with it (`BindsTo=`), but not start
            it; what needs the store to be there says `Requires=` and `After=` of
            `layered-stores.target`.
          '';
        };
      };
    };
in
{
  options.services.layeredStores = {
    enable = lib.mkEnableOption "layered Nix stores";

    # As long as it is not in Nixpkgs, the overlay of this repository may be missing.
    package = lib.mkPackageOption {
      layered-stores = pkgs.layered-stores or (pkgs.callPackage ../nix/package.nix { });
    } "layered-stores" { example = "pkgs.layered-stores.overrideAttrs { doCheck = false; }"; };

    settings = mkOption {
      type = toml.type;
      default = { };
      example = {
        stores.ci.lower-store = "/srv/base";
      };
      description = ''
        The daemon's configuration, `/etc/layered-stores/config.toml`, with its own keys. What
        {option}`services.layeredStores.stores` declares is in here already; a value that is given
        here wins over it. `layered-stores check-config` reads all of it while the system is
        built, and names the option in {option}`services.layeredStores.stores` beside each key
        that it refuses, also where the value is given here.
      '';
    };

    stores = mkOption {
      type = types.attrsOf (types.submodule store);
      default = { };
      example = {
        ci = {
          lowerStore = "daemon";
          daemon.enable = true;
          daemon.allowedGroups = [ "ci" ];
        };
      };
      description = ''
        The layered stores of this machine, by name. A name has lower-case letters, digits and
        `-`, and at most 64 characters. A store that is taken out of here is taken down by the next
        switch; its data stays where it is.
      '';
    };

    # One place for what the daemon is told and what `uri` says.
    remountHook = mkOption {
      type = types.str;
      internal = true;
      readOnly = true;
      # Not the package's own path: a URL that a script or a shell keeps has to go on working when
      # the package is upgraded, and the old one is collected as garbage.
      default = "/run/current-system/sw/bin/layered-stores-remount";
      description = "The executable that Nix calls when a merged directory has to be refreshed.";
    };
  };

  # Also without `enable`: `uri` and others follow from it, and others may read them.
  config.services.layeredStores.settings = {
    stores = lib.mapAttrs (
      name: store: lib.mapAttrsRecursive (_path: lib.mkDefault) (settingsLib.render name store)
    ) cfg.stores;
  };
}
