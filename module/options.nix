# What can be declared. The options that are keys of the configuration are in keys.nix.
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
  keys = import ./keys.nix { inherit lib; };
  settingsLib = import ./settings.nix { inherit lib; };
  toml = pkgs.formats.toml { };
  resolved = settingsLib.resolveAll cfg.settings;

  # As `mkEnableOption` puts it.
  switch =
    description:
    lib.mkEnableOption (
      lib.toLower (lib.substring 0 1 description)
      + lib.removeSuffix "." (lib.substring 1 (-1) description)
    );

  daemon = {
    enable = switch keys.words.daemon.description;

    allowedGroups = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "ci" ];
      description = "Groups whose members may use this store's Nix daemon.";
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

  # As `nix.gc` of NixOS has it.
  gc = {
    automatic = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether garbage is collected in this store at set times, by
        `layered-stores-gc-NAME.timer`. The lower store is not touched.
      '';
    };

    dates = mkOption {
      type = types.either types.singleLineStr (types.listOf types.singleLineStr);
      default = "03:15";
      example = "weekly";
      description = ''
        When, in the format of {manpage}`systemd.time(7)`. With several, each of them.
      '';
    };

    options = mkOption {
      type = types.strMatching " *(--(until-free|older-than)[ =][^ \n\t-][^ \n\t]* *)*" // {
        description = "options of `layered-stores gc`, of which there are --until-free and --older-than";
        descriptionClass = "noun";
      };
      default = "";
      example = "--until-free 20G --older-than 30d";
      description = ''
        What `layered-stores gc` is told. With nothing, all that has no root goes, and generations
        of profiles stay.
      '';
    };

    persistent = mkOption {
      type = types.bool;
      default = true;
      example = false;
      description = ''
        Whether it is made up for when the machine comes up, if the machine was off when it was
        due.
      '';
    };

    randomizedDelaySec = mkOption {
      type = types.singleLineStr;
      default = "0";
      example = "45min";
      description = ''
        How much later than {option}`gc.dates` it may begin, by chance; a time span in the format
        of {manpage}`systemd.time(7)`.
      '';
    };
  };

  store =
    { name, ... }:
    {
      options = lib.recursiveUpdate (keys.options name) {
        ephemeral = {
          enable = lib.mkEnableOption ''
            throwing the store's content away: all of its directories lie on a filesystem in
            memory, and are gone with the next boot'';
        };

        inherit daemon gc;

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

    metrics = {
      enable = lib.mkEnableOption ''
        figures about the stores, in Prometheus' text format: over HTTP at the socket
        `/run/layered-stores-metrics.sock`, for `/metrics`, and in
        {option}`services.layeredStores.metrics.textfile`'';

      textfile = mkOption {
        type = types.nullOr (types.strMatching "/[A-Za-z0-9/._-]+\\.prom");
        default = null;
        example = "/var/lib/prometheus-node-exporter/layered-stores.prom";
        description = ''
          A file that has the figures written to it, in one step, twice a minute. The node exporter
          reads it when its directory is named in
          {option}`services.prometheus.exporters.node.extraFlags`, as
          `--collector.textfile.directory=DIRECTORY`. The directory is made, and is root's.
        '';
      };
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
      name: store: lib.mapAttrsRecursive (_path: lib.mkDefault) (keys.table name store)
    ) cfg.stores;
  };
}
