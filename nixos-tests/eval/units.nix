# What NixOS adds to the package's units, and what a switch finds different between two systems.
#
# switch-to-configuration compares the units of the two, drop-ins and all. It reloads a service in
# which only X-Reload-Triggers= differs, and restarts it if anything else does; it stops an instance
# of a template whose drop-ins have gone, and never restarts a target.
{
  lib,
  evaluate,
  layered,
}:

let
  lines = text: lib.filter (line: line != "") (lib.splitString "\n" text);
  ci = evaluate [
    (layered {
      stores.ci = {
        lowerStore = "/srv/base";
        root = "/srv/ci/root";
        upperLayer = "/data/ci/upper";
        workDir = "/data/ci/work";
        daemon.enable = true;
        daemon.allowedUsers = [ "alice" ];
        daemon.serviceConfig = {
          MemoryMax = "8G";
          TasksMax = 4096;
        };
        remountUsers = [ "alice" ];
        remountGroups = [
          "ci"
          "ops"
        ];
      };
      stores.tmp = {
        lowerStore = "layered:ci";
        ephemeral.enable = true;
        ephemeral.size = "1G";
      };
    })
    { users.users.alice = { }; }
  ];
  daemon = "layered-storesd.service.d/overrides.conf";
  template = "layered-stores-nix-daemon@.service.d/overrides.conf";
  instance = name: "layered-stores-nix-daemon@${name}.service.d/overrides.conf";
  has = unit: line: lib.elem line (lines ci.units.${unit});

  # The transitions of switch.nix: every unit that differs, and how.
  machine = (import ../switch.nix).nodes.machine;
  base = evaluate [ machine ];
  transition =
    name:
    differences base (evaluate [
      machine
      base.config.specialisation.${name}.configuration
    ]);
  differences =
    old: new:
    lib.filterAttrs (_unit: difference: difference != null) (
      lib.mapAttrs (
        unit: _text:
        let
          before = lines (old.units.${unit} or "");
          after = lines (new.units.${unit} or "");
          gone = lib.subtractLists after before;
          come = lib.subtractLists before after;
          keys = lib.unique (map (line: lib.head (lib.splitString "=" line)) (gone ++ come));
        in
        if !new.units ? ${unit} then
          "gone"
        else if !old.units ? ${unit} then
          "new"
        else if keys == [ ] then
          null
        else
          keys
      ) (old.units // new.units)
    );
  reloaded.${daemon} = [ "X-Reload-Triggers" ];
in
{
  "test the package's units are used, and extended" = {
    expr = {
      packages = map (package: package.name) ci.config.systemd.packages;
      units = lib.attrNames ci.units;
      inherit (ci) wants;
    };
    expected = {
      packages = [ "layered-stores" ];
      units = [
        "layered-stores-filesystems.target"
        template
        (instance "ci")
        "layered-stores-wait.service.d/overrides.conf"
        "layered-stores.target.d/overrides.conf"
        daemon
      ];
      wants = [
        "multi-user.target.wants/layered-storesd.service"
        "multi-user.target.wants/layered-stores.target"
        "layered-storesd.service.wants/layered-stores-filesystems.target"
      ];
    };
  };

  "test the package is known to D-Bus, polkit and the shell" = {
    expr = {
      dbus = map (package: package.name) ci.config.services.dbus.packages;
      system = map (package: package.name) ci.config.environment.systemPackages;
      polkit = ci.config.security.polkit.enable;
      inherit (ci.config.environment.etc."layered-stores/config.toml".source) name;
    };
    expected = {
      dbus = [ "layered-stores" ];
      system = [ "layered-stores" ];
      polkit = true;
      name = "layered-stores-config.toml";
    };
  };

  "test the configuration is checked while the system is built" = {
    expr = lib.hasInfix "/usr/bin/layered-stores check-config /nix/store/" (
      ci.config.environment.etc."layered-stores/config.toml".source.script
    );
    expected = true;
  };

  "test nothing of a switch stops what is mounted" = {
    expr = {
      oneStep = map (unit: has unit "X-StopIfChanged=false") [
        daemon
        template
        (instance "ci")
      ];
      never = has "layered-stores-wait.service.d/overrides.conf" "X-RestartIfChanged=false";
    };
    expected = {
      oneStep = [
        true
        true
        true
      ];
      never = true;
    };
  };

  # systemd takes one of two drop-ins of the same name.
  "test the drop-in of an instance holds all that the template's holds" = {
    expr = {
      missing = lib.subtractLists (lines ci.units.${instance "ci"}) (lines ci.units.${template});
      more = lib.subtractLists (lines ci.units.${template}) (lines ci.units.${instance "ci"});
    };
    expected = {
      missing = [ ];
      more = [
        "MemoryMax=8G"
        "TasksMax=4096"
      ];
    };
  };

  "test filesystems are mounted before the daemon looks" = {
    expr =
      lib.filter (line: lib.hasPrefix "WantsMountsFor=" line || lib.hasPrefix "Before=" line)
        (lines ci.units."layered-stores-filesystems.target");
    expected = [ "Before=layered-storesd.service" ]
    ++ map (directory: "WantsMountsFor=${directory}") [
      "/srv/ci/root"
      "/data/ci/upper"
      "/data/ci/work"
      "/srv/base/nix/store"
    ];
  };

  "test remounting is a matter of polkit, by store" = {
    expr = ci.config.security.polkit.extraConfig;
    expected = ''
      // services.layeredStores.stores.ci: who may have it remounted
      polkit.addRule(function(action, subject) {
        var users = ["alice"];
        var groups = ["ci","ops"];
        if (action.id == "org.layeredstores1.remount" && action.lookup("store") == "ci") {
          if (users.indexOf(subject.user) >= 0 ||
              groups.some(function(group) { return subject.isInGroup(group); })) {
            return polkit.Result.YES;
          }
        }
      });
    '';
  };

  "test a switch: something else has changed" = {
    expr = transition "unrelated";
    expected = { };
  };
  "test a switch: a store has changed" = {
    expr = transition "changed";
    expected = reloaded // {
      # A target is never restarted.
      "layered-stores-filesystems.target" = [ "WantsMountsFor" ];
    };
  };
  "test a switch: a store has come" = {
    expr = transition "added";
    expected = reloaded // {
      "layered-stores-filesystems.target" = [ "WantsMountsFor" ];
    };
  };
  "test a switch: a store has gone" = {
    expr = transition "removed";
    expected = reloaded // {
      "layered-stores-filesystems.target" = [ "WantsMountsFor" ];
      ${instance "doomed"} = "gone";
    };
  };
  "test a switch: the limits of a Nix daemon have changed" = {
    expr = transition "limited";
    expected.${instance "served"} = [ "MemoryMax" ];
  };
  # The units themselves are in the package.
  "test a switch: the package has changed" = {
    expr = transition "upgraded";
    expected = reloaded;
  };
}
