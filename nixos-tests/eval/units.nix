# What NixOS adds to the package's units. What a switch makes of them is for the scenario `switch`.
{
  lib,
  pkgs,
  nixos,
  layered,
}:

let
  lines = text: lib.filter (line: line != "") (lib.splitString "\n" text);
  ciModules = [
    nixos.onDebian
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
        gc.automatic = true;
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
    { users.users.alice.isNormalUser = true; }
  ];
  ci = nixos.evaluateSystem ciModules;
  others = nixos.evaluateSystem (
    ciModules
    ++ [
      {
        networking.proxy.default = "http://proxy.example:3128";
        nix.envVars.TMPDIR = "/var/tmp";
        nix.daemonCPUSchedPolicy = "batch";
        nix.daemonIOSchedClass = "idle";
        nix.daemonIOSchedPriority = 7;
        systemd.services."layered-stores-nix-daemon@" = {
          path = [ pkgs.hello ];
          after = [ "here.service" ];
          environment.HERE = "yes";
          serviceConfig = {
            Nice = 5;
            # The store has its own.
            MemoryMax = "1G";
          };
        };
        systemd.services."layered-stores-nix-daemon@ci" = {
          path = [ pkgs.jq ];
          serviceConfig.OOMScoreAdjust = 500;
        };
        services.layeredStores.stores.ci.daemon.serviceConfig.CPUWeight = lib.mkForce 20;
      }
    ]
  );
  measured =
    metrics:
    nixos.evaluateSystem [
      nixos.onDebian
      (layered {
        inherit metrics;
        stores.ci.lowerStore = "/srv/base";
      })
    ];
  measuredUnits =
    evaluated: lib.filter (lib.hasPrefix "layered-stores-metrics") (lib.attrNames evaluated.units);
  unlimited = nixos.evaluateSystem [
    nixos.onDebian
    (layered {
      stores.ci.lowerStore = "local";
      stores.ci.daemon.enable = true;
      stores.ci.daemon.allowedUsers = [ "alice" ];
    })
    { users.users.alice.isNormalUser = true; }
  ];
  # An option of NixOS since 25.05.
  bundle = lib.optional (!ci.options.security.pki ? caBundle) {
    options.security.pki.caBundle = lib.mkOption { default = "/elsewhere/bundle.crt"; };
  };
  daemon = "layered-storesd.service.d/overrides.conf";
  template = "layered-stores-nix-daemon@.service.d/overrides.conf";
  instance = name: "layered-stores-nix-daemon@${name}.service.d/overrides.conf";
  gc = instance: "layered-stores-gc@${instance}.d/overrides.conf";
  has = unit: has' ci.units.${unit};
  has' = text: line: lib.elem line (lines text);
in
{
  "test the package's units are used, and extended" = {
    expr = {
      packages = map (package: package.pname) (lib.concatLists ci.said.systemd);
      units = lib.attrNames ci.units;
      inherit (ci) wants;
    };
    expected = {
      packages = [ "layered-stores" ];
      units = [
        "layered-stores-filesystems-ci.target"
        "layered-stores-gc-ci.timer"
        "layered-stores-gc@.service.d/overrides.conf"
        (gc "ci.service")
        template
        (instance "ci")
        "layered-stores-wait.service.d/overrides.conf"
        "layered-stores.target.d/overrides.conf"
        daemon
      ];
      wants = [
        "layered-storesd.service.wants/layered-stores-filesystems-ci.target"
        "timers.target.wants/layered-stores-gc-ci.timer"
        "multi-user.target.wants/layered-stores.target"
        "multi-user.target.wants/layered-storesd.service"
      ];
    };
  };

  "test the package is known to D-Bus, polkit and the shell" = {
    expr = {
      dbus = map (package: package.pname) (lib.concatLists ci.said.packages);
      system = map (package: package.pname) (lib.concatLists ci.said.systemPackages);
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
    expr = lib.hasInfix "/usr/bin/layered-stores check-config --nixos-options /nix/store/" (
      ci.config.environment.etc."layered-stores/config.toml".source.buildCommand
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
      # What the switch reads of a template alone, for an instance whose store has gone.
      missing = [ "X-RestartIfChanged=false" ];
      more = [
        "MemoryMax=8G"
        "TasksMax=4096"
        "X-RestartIfChanged=true"
      ];
    };
  };

  # switch-to-configuration-ng stops an instance whose last drop-in has gone, which the last limit
  # would take along.
  "test each instance has a drop-in, limits or not" = {
    expr = unlimited.units ? ${instance "ci"};
    expected = true;
  };

  "test what others say of the template or of an instance is not void" = {
    expr = map (line: has' others.units.${instance "ci"} line) [
      "Nice=5"
      "OOMScoreAdjust=500"
      "MemoryMax=8G"
      "CPUWeight=20"
      "Environment=\"HERE=yes\""
      "After=here.service"
    ];
    expected = [
      true
      true
      true
      true
      true
      true
    ];
  };
  "test both PATHs are one, and nothing is in it twice" = {
    expr =
      let
        path = lib.splitString ":" others.config.systemd.services."layered-stores-nix-daemon@ci".environment.PATH;
      in
      {
        has = map (package: lib.elem "${package}/bin" path) [
          pkgs.hello
          pkgs.jq
        ];
        twice = lib.length path - lib.length (lib.unique path);
      };
    expected = {
      has = [
        true
        true
      ];
      twice = 0;
    };
  };

  # As nixos/modules/services/system/nix-daemon.nix has it.
  "test a store's Nix daemon has what the host's has" = {
    expr =
      let
        host = others.config.systemd.services.nix-daemon;
        ours = others.config.systemd.services."layered-stores-nix-daemon@ci";
        template = others.config.systemd.services."layered-stores-nix-daemon@";
        inSection = [
          "CPUSchedulingPolicy"
          "IOSchedulingClass"
          "IOSchedulingPriority"
        ];
      in
      {
        environment = lib.filterAttrs (
          name: value: name != "PATH" && ours.environment.${name} or null != value
        ) host.environment;
        serviceConfig = lib.filter (
          key: ours.serviceConfig.${key} or null != host.serviceConfig.${key}
        ) inSection;
        proxy = ours.environment.https_proxy;
        path = lib.subtractLists (lib.splitString ":" ours.environment.PATH) (
          lib.splitString ":" host.environment.PATH
        );
        # And is restarted with it.
        triggers =
          template.restartTriggers == host.restartTriggers
          && ours.unitConfig.X-Restart-Triggers == template.unitConfig.X-Restart-Triggers;
      };
    expected = {
      environment = { };
      serviceConfig = [ ];
      proxy = "http://proxy.example:3128";
      path = [ ];
      triggers = true;
    };
  };
  "test certificates are where NixOS says they are" = {
    expr = lib.getAttrs [
      "CURL_CA_BUNDLE"
      "NIX_SSL_CERT_FILE"
    ] (nixos.evaluateSystem (bundle ++ ciModules)).config.systemd.services."layered-stores-nix-daemon@ci".environment;
    expected = {
      CURL_CA_BUNDLE = "/elsewhere/bundle.crt";
      NIX_SSL_CERT_FILE = "/elsewhere/bundle.crt";
    };
  };

  "test garbage is collected as nix.gc does it" = {
    expr =
      let
        of =
          gc:
          (nixos.evaluateSystem [
            nixos.onDebian
            (layered {
              stores.ci = {
                lowerStore = "local";
                root = "/srv/root";
                inherit gc;
              };
            })
          ]);
        said =
          evaluated: unit: prefixes:
          lib.filter (line: lib.any (prefix: lib.hasPrefix prefix line) prefixes) (
            lines (evaluated.units.${unit} or "")
          );
        timer = gc: said (of gc) "layered-stores-gc-ci.timer" [ "OnCalendar" "Persistent" "Randomized" "Unit=" ];
        unit = "layered-stores-gc@ci.service.d/overrides.conf";
        service = gc: said (of gc) unit [ "After" "Environment=\"OPTIONS" "X-Restart" ];
      in
      {
        none = timer { } ++ service { };
        timer = timer { automatic = true; };
        timers = timer {
          automatic = true;
          dates = [
            "Mon 04:00"
            "weekly"
          ];
          persistent = false;
          randomizedDelaySec = "45min";
        };
        service = service {
          automatic = true;
          options = "--until-free 20G --older-than=30d";
        };
        # For who starts it by hand.
        byHand = service { options = "--older-than 30d"; };
      };
    expected = {
      none = [ ];
      timer = [
        "OnCalendar=03:15"
        "Persistent=true"
        "RandomizedDelaySec=0"
        "Unit=layered-stores-gc@ci.service"
      ];
      timers = [
        "OnCalendar=Mon 04:00"
        "OnCalendar=weekly"
        "Persistent=false"
        "RandomizedDelaySec=45min"
        "Unit=layered-stores-gc@ci.service"
      ];
      service = [
        "After=srv-root-nix-store.mount"
        "Environment=\"OPTIONS=--until-free 20G --older-than=30d\""
        "X-RestartIfChanged=false"
      ];
      byHand = [
        "After=srv-root-nix-store.mount"
        "Environment=\"OPTIONS=--older-than 30d\""
        "X-RestartIfChanged=false"
      ];
    };
  };

  "test filesystems are mounted before the daemon looks" = {
    expr = lib.filter (
      line: lib.hasPrefix "RequiresMountsFor=" line || lib.hasPrefix "Before=" line
    ) (lines ci.units."layered-stores-filesystems-ci.target");
    expected = [ "Before=layered-storesd.service" ]
    ++ map (directory: "RequiresMountsFor=${directory}") [
      "/srv/ci/root"
      "/data/ci/upper"
      "/data/ci/work"
      "/srv/base/nix/store"
    ];
  };

  "test figures are there for whoever wants them, and where they are wanted" = {
    expr = {
      nowhere = map measuredUnits [
        (measured { })
        (measured { textfile = "/var/lib/figures/layered-stores.prom"; })
      ];
      socket = measuredUnits (measured { enable = true; });
    };
    expected = {
      nowhere = [
        [ ]
        [ ]
      ];
      socket = [ "layered-stores-metrics.socket.d/overrides.conf" ];
    };
  };
  "test figures are written to the file that is named" = {
    expr =
      let
        evaluated = measured {
          enable = true;
          textfile = "/var/lib/figures/layered-stores.prom";
        };
        service = evaluated.units."layered-stores-metrics.service.d/overrides.conf";
      in
      {
        wants = lib.filter (lib.hasInfix "metrics") evaluated.wants;
        lines = map (has' service) [
          "Environment=\"TEXTFILE=/var/lib/figures/layered-stores.prom\""
          "ReadWritePaths=/var/lib/figures"
        ];
        directory = lib.filter (lib.hasInfix "/var/lib/figures") evaluated.config.systemd.tmpfiles.rules;
      };
    expected = {
      wants = [
        "sockets.target.wants/layered-stores-metrics.socket"
        "timers.target.wants/layered-stores-metrics.timer"
      ];
      lines = [
        true
        true
      ];
      directory = [ "d '/var/lib/figures' 0755 root root - -" ];
    };
  };

  "test remounting is a matter of polkit, by store" = {
    expr = lib.concatStrings ci.said.extraConfig;
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
}
