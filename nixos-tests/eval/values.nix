# What follows from a configuration: the daemon's file, and the values for use elsewhere.
{
  lib,
  pkgs,
  nixos,
  withStores,
  layered,
}:

let
  inherit (nixos) evaluate;
  store = evaluated: name: evaluated.config.services.layeredStores.stores.${name};
  hook = "remount-hook=/run/current-system/sw/bin/layered-stores-remount";
  state = "/var/lib/layered-stores/stores";
  tables = stores: (withStores stores).settings.stores;
  uri = evaluated: name: (store evaluated name).uri;
  top = withStores {
    base.lowerStore = "/l?read-only=true";
    top.lowerStore = "layered:base";
  };
  ci = withStores {
    ci = {
      lowerStore = "daemon";
      daemon.enable = true;
      daemon.allowedGroups = [ "ci" ];
    };
  };
  full = {
    lowerStore = "/srv/base";
    root = "/srv/ci/root";
    upperLayer = "/srv/ci/upper";
    workDir = "/srv/ci/work";
    owner = "alice";
    group = "users";
    mode = "0755";
    autostart = false;
    required = false;
    leases = "all";
    mountOptions = [ "noatime" ];
    daemon = {
      enable = true;
      socketPath = "/run/ci.sock";
      socketMode = "0660";
      allowedUsers = [ "bob" ];
      allowedGroups = [ "ci" ];
      trustedUsers = [ "@wheel" ];
      settings = {
        max-jobs = 2;
        substituters = [ ];
        auto-optimise-store = false;
      };
    };
  };
  overridden = evaluate [
    (layered {
      stores.ci.lowerStore = "/srv/base";
      settings.stores.ci.lower-store = "/srv/other";
      settings.stores.ci.root = "/srv/ci/root";
      settings.stores.plain.lower-store = "layered:ci";
    })
  ];
in
{
  "test nothing is declared" = {
    expr = (withStores { }).settings;
    expected = {
      stores = { };
    };
  };

  "test nothing happens without enable" = {
    expr =
      let
        evaluated = nixos.evaluateSystem [ { services.layeredStores.stores.BAD.lowerStore = "up"; } ];
      in
      {
        inherit (evaluated)
          failures
          warnings
          units
          said
          ;
      };
    expected = {
      failures = [ ];
      warnings = [ ];
      units = { };
      said = lib.genAttrs [
        "etc"
        "extraConfig"
        "packages"
        "services"
        "systemPackages"
        "systemd"
        "targets"
      ] (_option: [ ]);
    };
  };

  "test others may read what follows from a store without enable" = {
    expr =
      let
        inherit (nixos.evaluate [ { services.layeredStores.stores.ci.lowerStore = "local"; } ]) config;
        ci = config.services.layeredStores.stores.ci;
      in
      {
        inherit (ci) uri realStoreDir mountUnit;
      };
    expected = {
      uri = "local-overlay://?root=${state}/ci/root&lower-store=local&upper-layer=${state}/ci/upper&${hook}";
      realStoreDir = "${state}/ci/root/nix/store";
      mountUnit = "var-lib-layered\\x2dstores-stores-ci-root-nix-store.mount";
    };
  };

  # As options of NixOS itself do.
  "test directories may be paths, and are not copied into the store" = {
    expr =
      (withStores {
        ci = {
          lowerStore = /srv/base;
          root = /srv/ci/root;
          upperLayer = /srv/ci/upper;
          workDir = /srv/ci/work;
          daemon.enable = true;
          daemon.socketPath = /run/ci.sock;
        };
      }).settings.stores.ci;
    expected = {
      lower-store = "/srv/base";
      root = "/srv/ci/root";
      upper-layer = "/srv/ci/upper";
      work-dir = "/srv/ci/work";
      daemon.allowed-users = [ "root" ];
      daemon.socket-path = "/run/ci.sock";
    };
  };
  "test a daemon's service takes what every service takes" = {
    expr =
      lib.filter (line: lib.hasPrefix "IO" line || lib.hasPrefix "Exec" line || lib.hasPrefix "CPUW" line)
        (
          lib.splitString "\n"
            (evaluate [
              (layered {
                stores.ci = {
                  lowerStore = "local";
                  daemon.enable = true;
                  daemon.serviceConfig = {
                    CPUWeight = lib.mkDefault 20;
                    IOWeight = null;
                    ExecStartPre = [
                      ""
                      pkgs.hello
                    ];
                    IOReadIOPSMax = [ "/dev/vda 1000" ];
                  };
                };
              })
              # More than one place may say something.
              (layered { stores.ci.daemon.serviceConfig.IOReadIOPSMax = [ "/dev/vdb 1000" ]; })
            ]).units."layered-stores-nix-daemon@ci.service.d/overrides.conf"
        );
    expected = [
      "CPUWeight=20"
      "ExecStartPre="
      "ExecStartPre=${pkgs.hello}"
      "IOReadIOPSMax=/dev/vda 1000"
      "IOReadIOPSMax=/dev/vdb 1000"
      "IOSchedulingClass=best-effort"
      "IOSchedulingPriority=4"
      "IOWeight="
    ];
  };

  "test a group of users" = {
    expr = { inherit (ci) settings failures; };
    expected = {
      settings.stores.ci = {
        lower-store = "daemon";
        daemon.allowed-users = [ "@ci" ];
      };
      failures = [ ];
    };
  };

  "test whoever names no users lets in the trusted ones only" = {
    expr = tables {
      a = {
        lowerStore = "local";
        daemon.enable = true;
      };
      b = {
        lowerStore = "local";
        daemon.enable = true;
        daemon.trustedUsers = [ "@wheel" ];
      };
    };
    expected = {
      a = {
        lower-store = "local";
        daemon.allowed-users = [ "root" ];
      };
      b = {
        lower-store = "local";
        daemon.allowed-users = [ "@wheel" ];
        daemon.trusted-users = [ "@wheel" ];
      };
    };
  };

  "test every option reaches the daemon" = {
    expr = tables { ci = full; };
    expected.ci = {
      lower-store = "/srv/base";
      root = "/srv/ci/root";
      upper-layer = "/srv/ci/upper";
      work-dir = "/srv/ci/work";
      owner = "alice";
      group = "users";
      mode = "0755";
      autostart = false;
      required = false;
      leases = "all";
      mount-options = [ "noatime" ];
      daemon = {
        socket-path = "/run/ci.sock";
        socket-mode = "0660";
        allowed-users = [
          "bob"
          "@ci"
        ];
        trusted-users = [ "@wheel" ];
        settings = {
          max-jobs = 2;
          substituters = [ ];
          auto-optimise-store = false;
        };
      };
    };
  };

  "test the file says what the settings say" = {
    expr = builtins.fromTOML (withStores { ci = full; }).toml;
    expected = (withStores { ci = full; }).settings;
  };

  "test an ephemeral store has a size and no directories" = {
    expr = tables {
      a = {
        lowerStore = "local";
        ephemeral.enable = true;
        ephemeral.size = "2G";
      };
      b = {
        lowerStore = "local";
        ephemeral.enable = true;
        ephemeral.size = 1073741824;
      };
      # A size alone is not yet a wish.
      c = {
        lowerStore = "local";
        ephemeral.size = "50%";
      };
    };
    expected = {
      a = {
        lower-store = "local";
        ephemeral-size = "2G";
      };
      b = {
        lower-store = "local";
        ephemeral-size = "1073741824";
      };
      c.lower-store = "local";
    };
  };

  "test settings win, and may declare stores of their own" = {
    expr = {
      inherit (overridden.settings) stores;
      inherit (overridden) failures;
      inherit (store overridden "ci") uri mountUnit;
    };
    expected = {
      failures = [ ];
      stores.ci = {
        lower-store = "/srv/other";
        root = "/srv/ci/root";
      };
      stores.plain.lower-store = "layered:ci";
      uri = "local-overlay://?root=/srv/ci/root&lower-store=/srv/other&upper-layer=${state}/ci/upper&${hook}";
      mountUnit = "srv-ci-root-nix-store.mount";
    };
  };

  "test the URL, directory and unit of a store" = {
    expr = {
      inherit (store ci "ci") uri realStoreDir mountUnit;
    };
    expected = {
      uri = "local-overlay://?root=${state}/ci/root&lower-store=daemon&upper-layer=${state}/ci/upper&${hook}";
      realStoreDir = "${state}/ci/root/nix/store";
      mountUnit = "var-lib-layered\\x2dstores-stores-ci-root-nix-store.mount";
    };
  };

  # The same as in crates/model/src/stack.rs, but for the directories.
  "test the URL of a store on a store is encoded once a level" = {
    expr = {
      base = uri top "base";
      top = uri top "top";
    };
    expected = {
      base = "local-overlay://?root=${state}/base/root&lower-store=/l%3Fread-only%3Dtrue&upper-layer=${state}/base/upper&${hook}";
      top =
        "local-overlay://?root=${state}/top/root"
        + "&lower-store=local-overlay%3A//%3Froot%3D${state}/base/root"
        + "%26lower-store%3D/l%253Fread-only%253Dtrue%26upper-layer%3D${state}/base/upper"
        + "%26remount-hook%3D/run/current-system/sw/bin/layered-stores-remount"
        + "&upper-layer=${state}/top/upper&${hook}";
    };
  };

  "test units of mounts are named as systemd-escape names them" = {
    expr = map (import ../../module/lib.nix { inherit lib; }).mountUnit [
      "/nix/store"
      "/mnt/merged-store/nix/store"
      "/.hidden/a.b_c"
    ];
    expected = [
      "nix-store.mount"
      "mnt-merged\\x2dstore-nix-store.mount"
      "\\x2ehidden-a.b_c.mount"
    ];
  };

  "test the directory of a lower store is where Nix has it" = {
    expr = lib.genAttrs [
      "layered:a"
      "/x?read-only=true"
      "daemon?root=/x"
      "local?root=/x&real=/y/store&read-only=true"
      "local?store=/nix/store&root=%2Fx"
      "local:///srv/a?read-only=true"
      "unix:///run/other.sock?root=/x"
      "unix://"
      "local?root="
    ] (import ../../module/lib.nix { inherit lib; }).readLowerStore;
    expected =
      let
        at = dir: throughDaemon: url: { inherit url dir throughDaemon; };
      in
      {
        "layered:a" = {
          layered = "a";
        };
      }
      // lib.mapAttrs (url: of: of url) {
        "/x?read-only=true" = at "/x/nix/store" false;
        "daemon?root=/x" = at "/x/nix/store" true;
        "local?root=/x&real=/y/store&read-only=true" = at "/y/store" false;
        "local?store=/nix/store&root=%2Fx" = at "/x/nix/store" false;
        "local:///srv/a?read-only=true" = at "/srv/a/nix/store" false;
        "unix:///run/other.sock?root=/x" = at "/x/nix/store" false;
        "unix://" = at "/nix/store" true;
        "local?root=" = at "/nix/store" false;
      };
  };

  # Pre-releases of 2.26 have what is needed, and a package need not say what it is.
  "test a Nix that may do is not refused" = {
    expr =
      let
        failures =
          nix:
          (evaluate [
            (layered { stores.ci.lowerStore = "local"; })
            { inherit nix; }
          ]).failures;
        nameless = removeAttrs (nixos.installed "nix" "0") [
          "name"
          "pname"
          "version"
        ];
      in
      map failures [
        { package = nixos.installed "nix" "2.26.0pre20241220_abcdef"; }
        { package = nameless // { name = "mine"; }; }
        { package = nameless; }
        # Nobody uses it.
        {
          package = nixos.installed "nix" "2.18.1";
          enable = false;
        }
      ];
    expected = [
      [ ]
      [ ]
      [ ]
      [ ]
    ];
  };

  "test accounts that nobody declares are pointed out" = {
    expr =
      let
        stores.ci = {
          lowerStore = "local";
          owner = "alice";
          remountGroups = [ "ops" ];
          remountUsers = [ "1000" ];
          daemon.enable = true;
          daemon.allowedUsers = [ "*" ];
          daemon.allowedGroups = [ "ci" ];
          daemon.trustedUsers = [
            "root"
            "@wheel"
          ];
        };
        warnings = more: (evaluate ([ (layered { inherit stores; }) ] ++ more)).warnings;
      in
      {
        none = warnings [ ];
        declared = warnings [
          {
            users.users.someone.name = "alice";
            users.groups.ci = { };
            users.groups.ops = { };
          }
        ];
        network = warnings [
          {
            system.nssDatabases = lib.genAttrs [ "passwd" "group" ] (_database: [
              "files"
              "sss"
            ]);
          }
        ];
      };
    expected = {
      none =
        let
          say =
            option: kind: name:
            "services.layeredStores.stores.ci.${option}: there is no ${kind} \"${name}\" in this "
            + "configuration; declare it in users.${kind}s, or name another";
        in
        [
          (say "owner" "user" "alice")
          (say "remountGroups" "group" "ops")
          (say "daemon.allowedGroups" "group" "ci")
        ];
      declared = [ ];
      network = [ ];
    };
  };
}
