# Units, D-Bus, polkit and /etc. The units themselves are the package's, the same as on every other
# system; here is what NixOS adds to them.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  cfg = config.services.layeredStores;
  settingsLib = import ./settings.nix { inherit lib; };
  stores = lib.attrValues (settingsLib.resolveAll cfg.settings);

  # The configuration, refused while the system is built if the daemon would refuse it: what types
  # and assertions do not say is left to this. The package runs itself while it is built, and so it
  # can be run here.
  unchecked = (pkgs.formats.toml { }).generate "config.toml" cfg.settings;
  configuration = pkgs.runCommand "layered-stores-config.toml" { preferLocalBuild = true; } ''
    ${cfg.package}/bin/layered-stores check-config --nixos-options ${unchecked}
    cp ${unchecked} $out
  '';

  # What the host's Nix daemon has (nixos/modules/services/system/nix-daemon.nix), for the template
  # of the stores' daemons.
  nixDaemon = {
    overrideStrategy = "asDropin";
    path = [
      config.nix.package
      pkgs.util-linux
      config.programs.ssh.package
    ]
    ++ lib.optional config.nix.distributedBuilds pkgs.gzip;
    environment =
      config.nix.envVars
      // {
        CURL_CA_BUNDLE = caBundle;
        NIX_SSL_CERT_FILE = caBundle;
      }
      // config.networking.proxy.envVars;
    serviceConfig = {
      CPUSchedulingPolicy = config.nix.daemonCPUSchedPolicy;
      IOSchedulingClass = config.nix.daemonIOSchedClass;
      IOSchedulingPriority = config.nix.daemonIOSchedPriority;
    };
    # `nix.settings` hold for it as well, and a daemon reads them when it starts.
    restartTriggers = lib.optional (nixConf != null) nixConf;
    # In one step: while it is stopped, a connection to the socket would start the old one.
    stopIfChanged = false;
    # A switch reads the template for an instance whose drop-in has gone, which is to say whose
    # store has gone: the daemon has stopped it by then, and a restart would start it again.
    restartIfChanged = false;
  };
  nixConf = config.environment.etc."nix/nix.conf".source or null;
  # NixOS before 25.05 has no option for it.
  caBundle = config.security.pki.caBundle or "/etc/ssl/certs/ca-certificates.crt";

  # The drop-in of an instance hides that of the template, because NixOS calls all `overrides.conf`.
  # So it has all that is in the template's, also what others than this module have put there; what
  # is said of the instance itself goes before. Each instance has one, limits or not: newer switches
  # (switch-to-configuration-ng) stop an instance whose drop-in has gone.
  nixDaemonOf =
    name:
    let
      template = config.systemd.services.${nixDaemonUnit ""};
      itself = config.systemd.services.${nixDaemonUnit name};
      inherited = lib.mapAttrs (_key: lib.mkOverride (lib.modules.defaultOverridePriority + 1));
      path = lib.unique (template.path ++ itself.path);
    in
    {
      inherit (template) stopIfChanged;
      overrideStrategy = "asDropin";
      unitConfig = inherited template.unitConfig;
      environment = inherited (removeAttrs template.environment [ "PATH" ]) // {
        PATH = lib.mkOverride (
          lib.modules.defaultOverridePriority - 1
        ) "${lib.makeBinPath path}:${lib.makeSearchPathOutput "bin" "sbin" path}";
      };
      serviceConfig = lib.mkMerge [
        (inherited template.serviceConfig)
        (cfg.stores.${name}.daemon.serviceConfig or { })
        # The template's drop-in says no, and a switch reads both.
        { X-RestartIfChanged = true; }
      ];
    };
  nixDaemonUnit = name: "layered-stores-nix-daemon@${name}";

  textfile = if cfg.metrics.enable then cfg.metrics.textfile else null;

  # The drop-in of an instance hides that of the template here as well.
  gcUnit = name: "layered-stores-gc@${name}";
  gcService = {
    overrideStrategy = "asDropin";
    path = [ config.nix.package ];
    # A switch is no reason to collect garbage, and none to break it off.
    restartIfChanged = false;
  };
  gcStores = lib.filterAttrs (_name: { gc, ... }: gc.automatic || gc.options != "") cfg.stores;
  gcServiceOf =
    name:
    { gc, mountUnit, ... }:
    lib.nameValuePair (gcUnit name) (
      gcService
      // {
        environment.OPTIONS = gc.options;
        # Ends before the mount does when the machine is shut down.
        after = [ mountUnit ];
      }
    );
  gcTimerOf =
    name:
    { gc, ... }:
    # Not an instance of the package's template: a switch would leave that running when it goes.
    lib.nameValuePair "layered-stores-gc-${name}" {
      description = "Timer of the Garbage Collection in the Layered Nix Store ${name}";
      documentation = [ "man:layered-stores-gc(1)" ];
      wantedBy = [ "timers.target" ];
      timerConfig = {
        Unit = "${gcUnit name}.service";
        OnCalendar = lib.toList gc.dates;
        Persistent = gc.persistent;
        RandomizedDelaySec = gc.randomizedDelaySec;
      };
    };

  remountRule = name: store: ''
    // services.layeredStores.stores.${name}: who may have it remounted
    polkit.addRule(function(action, subject) {
      var users = ${builtins.toJSON store.remountUsers};
      var groups = ${builtins.toJSON store.remountGroups};
      if (action.id == "org.layeredstores1.remount" && action.lookup("store") == "${name}") {
        if (users.indexOf(subject.user) >= 0 ||
            groups.some(function(group) { return subject.isInGroup(group); })) {
          return polkit.Result.YES;
        }
      }
    });
  '';
  remountRules = lib.concatStringsSep "\n" (
    lib.mapAttrsToList remountRule (
      lib.filterAttrs (_name: store: store.remountUsers ++ store.remountGroups != [ ]) cfg.stores
    )
  );
in
{
  config = lib.mkIf cfg.enable {
    environment.systemPackages = [ cfg.package ];
    environment.etc."layered-stores/config.toml".source = configuration;

    services.dbus.packages = [ cfg.package ];
    security.polkit.enable = lib.mkDefault true;
    security.polkit.extraConfig = lib.mkIf (remountRules != "") remountRules;

    systemd.packages = [ cfg.package ];

    # NixOS ignores [Install], so what is to start at boot is said here.
    systemd.targets = {
      layered-stores = {
        overrideStrategy = "asDropin";
        wantedBy = [ "multi-user.target" ];
      };
    }
    # The filesystems on which a store lies are mounted before the daemon looks at it. In units of
    # their own: as part of the daemon's, a new directory would have a switch restart the daemon
    # instead of reloading it. One for each store, and none that the daemon requires: a filesystem
    # that is missing is the problem of that store. WantsMountsFor= would need systemd 256.
    // lib.listToAttrs (
      map (
        store:
        lib.nameValuePair "layered-stores-filesystems-${store.name}" {
          description = "Filesystems of the Layered Nix Store ${store.name}";
          documentation = [ "man:layered-storesd(8)" ];
          wantedBy = [ "layered-storesd.service" ];
          before = [ "layered-storesd.service" ];
          unitConfig.RequiresMountsFor = lib.unique (settingsLib.directories store);
        }
      ) (lib.filter (store: settingsLib.directories store != [ ]) stores)
    );

    systemd.sockets = lib.mkIf cfg.metrics.enable {
      layered-stores-metrics = {
        overrideStrategy = "asDropin";
        wantedBy = [ "sockets.target" ];
      };
    };
    systemd.timers =
      lib.optionalAttrs (textfile != null) {
        layered-stores-metrics = {
          overrideStrategy = "asDropin";
          wantedBy = [ "timers.target" ];
        };
      }
      // lib.mapAttrs' gcTimerOf (lib.filterAttrs (_name: { gc, ... }: gc.automatic) cfg.stores);
    systemd.tmpfiles.rules = lib.mkIf (textfile != null) [
      "d '${dirOf textfile}' 0755 root root - -"
    ];

    systemd.services = {
      layered-storesd = {
        overrideStrategy = "asDropin";
        wantedBy = [ "multi-user.target" ];
        environment.LAYERED_STORES_REMOUNT_HOOK = cfg.remountHook;
        # A switch reloads the daemon when this is all that differs. The daemon then changes the
        # stores that have changed, and no other.
        reloadTriggers = [ configuration ];
        # Mounts outlive the daemon. In one step, so that nobody who asks over D-Bus meanwhile
        # starts the old one again.
        stopIfChanged = false;
      };

      # It is done once it has waited. Restarting it would stop layered-stores.target, and with it
      # whatever requires that, although no store has gone away.
      layered-stores-wait = {
        overrideStrategy = "asDropin";
        restartIfChanged = false;
      };

      ${nixDaemonUnit ""} = nixDaemon;

      ${gcUnit ""} = gcService;
    }
    // lib.optionalAttrs (textfile != null) {
      layered-stores-metrics = {
        overrideStrategy = "asDropin";
        environment.TEXTFILE = textfile;
        serviceConfig.ReadWritePaths = [ (dirOf textfile) ];
      };
    }
    // lib.mapAttrs' gcServiceOf gcStores
    // lib.listToAttrs (
      map ({ name, ... }: lib.nameValuePair (nixDaemonUnit name) (nixDaemonOf name)) (
        lib.filter (store: store.socketPath != null) stores
      )
    );
  };
}
