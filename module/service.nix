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

  # The configuration, refused while the system is built if the daemon would refuse it. Assertions
  # have found what they can by now; this is the daemon's own word.
  unchecked = (pkgs.formats.toml { }).generate "config.toml" cfg.settings;
  configuration =
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      pkgs.runCommand "layered-stores-config.toml" { preferLocalBuild = true; } ''
        ${cfg.package}/bin/layered-stores check-config ${unchecked}
        cp ${unchecked} $out
      ''
    else
      unchecked;

  # What every Nix daemon of a store needs. A drop-in of one instance replaces the drop-in of the
  # template that has the same name, and NixOS gives all the same name, so this is in both.
  nixDaemon = {
    overrideStrategy = "asDropin";
    path = [
      config.nix.package
      config.programs.ssh.package
    ];
    # The host's daemon has these for downloads, proxies among them.
    environment = {
      CURL_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt";
    }
    // config.nix.envVars;
    # In one step: while it is stopped, a connection to the socket would start the old one.
    stopIfChanged = false;
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
    systemd.targets.layered-stores = {
      overrideStrategy = "asDropin";
      wantedBy = [ "multi-user.target" ];
    };

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

      "layered-stores-nix-daemon@" = nixDaemon;
    }
    // lib.listToAttrs (
      map (
        { name, ... }:
        # One for each, limits or not: a switch stops instances whose last drop-in has gone, which
        # is right when the store's daemon has gone, and wrong when only the limits have.
        lib.nameValuePair "layered-stores-nix-daemon@${name}" (
          nixDaemon // { serviceConfig = cfg.stores.${name}.daemon.serviceConfig or { }; }
        )
      ) (lib.filter (store: store.socketPath != null) stores)
    );

    # The filesystems on which stores lie are mounted before the daemon looks at them. In a unit of
    # its own: as part of the daemon's, a new directory would have a switch restart the daemon
    # instead of reloading it. Wanted and not required: a filesystem that is missing is the problem
    # of one store.
    systemd.targets.layered-stores-filesystems = {
      description = "Filesystems of Layered Nix Stores";
      documentation = [ "man:layered-storesd(8)" ];
      wantedBy = [ "layered-storesd.service" ];
      before = [ "layered-storesd.service" ];
      unitConfig.WantsMountsFor = lib.unique (lib.concatMap settingsLib.directories stores);
    };
  };
}
