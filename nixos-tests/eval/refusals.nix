# Configurations that are refused while they are evaluated, each with all that is said about it.
#
# `daemon`: layered-stores check-config refuses the rendered file as well; the others are about what
# only NixOS knows. `words`: it does so in the same words, as they stand behind the option.
{ lib, layered }:

let
  refusal = configuration: messages: {
    inherit configuration messages;
    daemon = true;
    words = true;
  };
  onNixOS = configuration: messages: refusal configuration messages // { daemon = false; };
  inOtherWords = lib.mapAttrs (_name: refusal: refusal // { words = false; });
  stores = stores: refusal (layered { inherit stores; });
  settings = settings: refusal (layered { inherit settings; });
  # A store that is sound but for what is given, and what is said about that.
  ci = more: sentence: stores { ci = { lowerStore = "/l"; } // more; } [ (of "ci" sentence) ];
  lower = lowerStore: sentence: ci { inherit lowerStore; } "lowerStore = ${quoted lowerStore}: ${sentence}";
  daemon =
    more: sentence:
    ci {
      daemon = {
        enable = true;
        allowedGroups = [ "users" ];
      }
      // more;
    } "daemon.${sentence}";
  nix = settings: sentence: daemon { inherit settings; } "settings.${sentence}";
  named = name: stores { ${name}.lowerStore = "/l"; };

  control = shown: "it holds '${shown}', as it is or percent-encoded, which no store's URL has to; take it away";
  one = layered { stores.ci.lowerStore = "local"; };
  withNix =
    package:
    onNixOS {
      imports = [ one ];
      nix = { inherit package; };
    };
  withoutVersion = removeAttrs (nixOf "nix" "0") [
    "version"
    "pname"
    "name"
  ];
  nixOf = pname: version: {
    type = "derivation";
    name = "${pname}-${version}";
    inherit pname version;
    outPath = "/usr";
    out = nixOf pname version;
  };

  of = name: sentence: "services.layeredStores.stores.${name}.${sentence}";
  quoted = builtins.toJSON;
  repeat = count: text: lib.concatStrings (lib.genList (_index: text) count);

  # Every path is read in the same way.
  paths = {
    "empty" = {
      path = "";
      sentence = "the path is empty; give an absolute path";
    };
    "relative" = {
      path = "upper";
      sentence = "the path is relative; give an absolute path";
    };
    "the root directory" = {
      path = "/";
      sentence = "the root directory cannot be used here; give a directory of its own";
    };
    "long" = {
      path = "/${repeat 254 "a"}";
      sentence = "the path is 255 bytes long; the kernel takes at most 254";
    };
    "trailing slash" = {
      path = "/a/";
      sentence = "the path ends in '/'; leave the last '/' away";
    };
    "parent directory" = {
      path = "/a/../b";
      sentence = "the path holds \"..\" as a component; write the path without it";
    };
    "this directory" = {
      path = "/a/./b";
      sentence = "the path holds \".\" as a component; write the path without it";
    };
    "two slashes" = {
      path = "/a//b";
      sentence = "the path holds \"\" as a component; write the path without it";
    };
    "blank" = {
      path = "/a b";
      sentence = "the path holds ' '; ${characters}";
    };
    "comma" = {
      path = "/a,b";
      sentence = "the path holds ','; ${characters}";
    };
    "colon" = {
      path = "/a:b";
      sentence = "the path holds ':'; ${characters}";
    };
    "percent" = {
      path = "/a%b";
      sentence = "the path holds '%'; ${characters}";
    };
    "backslash" = {
      path = "/a\\b";
      sentence = "the path holds '\\\\'; ${characters}";
    };
    "letter beyond ASCII" = {
      path = "/aä";
      sentence = "the path holds 'ä'; ${characters}";
    };
  };
  characters = "only letters, digits, '/', '.', '_' and '-' are safe in mount options";
  pathOptions = [
    "root"
    "upperLayer"
    "workDir"
  ];
  everyPath = lib.listToAttrs (
    lib.concatMap (
      option:
      lib.mapAttrsToList (
        name:
        { path, sentence }:
        lib.nameValuePair "${option}, ${name}" (
          ci { ${option} = path; } "${option} = ${quoted path}: ${sentence}"
        )
      ) paths
    ) pathOptions
  );

  noDirectory =
    scheme:
    "a \"${scheme}\" store has no directory on this machine; an overlay needs one: use a root "
    + "directory, \"daemon\", \"local\" or \"layered:NAME\"";
  own = "give each a directory of its own";
  name = "use lower-case letters, digits and '-' only";
  modeForm =
    "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";
  everybody = "everybody could write into the store; take the last digit's 2 away";
  size =
    "a size is a number of bytes, with K, M, G or T behind it for powers of 1024, or a part of the "
    + "memory from \"1%\" to \"100%\"";
  explicit =
    "an ephemeral store has all of its directories on a filesystem of its own; take this away, or "
    + "ephemeral-size";
  socketForm = "a mode is three or four octal digits, such as \"0666\"";
  nixUser = "is not a user's name, a group's as \"@group\", or \"*\" for everybody";
  counts =
    "Nix counts wrongly how much is freed in a layered store, and would delete more than is asked "
    + "for; take the setting away";
  allowed = "this is set with daemon.allowedUsers and daemon.allowedGroups; take the setting away";
  trusted = "this is set with daemon.trustedUsers; take the setting away";
  oneLine = "has to be one line; take the line break away";

  # Two stores, the first of which has these directories.
  a = {
    lowerStore = "/l";
    root = "/a/root";
    upperLayer = "/a/up";
    workDir = "/a/work";
  };
  b = {
    lowerStore = "/l";
    root = "/b/root";
    upperLayer = "/b/up";
    workDir = "/b/work";
  };
  two =
    option: value: sentence:
    stores {
      inherit a;
      b = b // { ${option} = value; };
    } [ (of "b" "${option} = ${quoted value}: ${sentence}") ];
in
everyPath
// {
  # Names
  "name, capital letter" = named "CI" [
    "services.layeredStores.stores.CI: the name holds 'C'; ${name}"
  ];
  "name, underscore" = named "a_b" [
    "services.layeredStores.stores.a_b: the name holds '_'; ${name}"
  ];
  "name, dash in front" = named "-a" [
    "services.layeredStores.stores.\"-a\": the name starts with '-'; start it with a lower-case letter or a digit"
  ];
  "name, empty" = named "" [
    "services.layeredStores.stores.\"\": a store's name is empty; use lower-case letters, digits and '-'"
  ];
  "name, long" = named (repeat 65 "a") [
    "services.layeredStores.stores.${repeat 65 "a"}: the name is 65 bytes long; the most is 64"
  ];

  # Lower stores
  "lower store, none" = stores { ci = { }; } [
    (of "ci" "lowerStore: key \"lower-store\" is missing; name the store underneath, for example \"daemon\"")
  ];
  "lower store, empty" =
    lower "" "it is empty; name a root directory, a Nix store URL such as \"daemon\", or \"layered:NAME\"";
  "lower store, the root directory" =
    lower "/" "the host's own store is written \"daemon\" (through its daemon) or \"local\" (directly)";
  "lower store, another machine" = lower "ssh-ng://host" (noDirectory "ssh-ng");
  "lower store, a binary cache" = lower "https://cache.example.org" (noDirectory "https");
  "lower store, a word" = lower "host" (noDirectory "host");
  "lower store, relative" = lower "./base" "the path is relative; give an absolute path";
  "lower store, relative root" = lower "local?root=base" "the path is relative; give an absolute path";
  "lower store, trailing slash" = lower "/l/" "the path ends in '/'; leave the last '/' away";
  "lower store, blank" = lower "/l l" "the path holds ' '; ${characters}";
  "lower store, escaped blank" = lower "local?root=/l%20l" "the path holds ' '; ${characters}";
  "lower store, another store directory" =
    lower "local?store=/gnu/store" "its store directory is \"/gnu/store\"; a layered store needs one that is \"/nix/store\"";
  "lower store, no name" =
    lower "layered:UP" "what follows \"layered:\" is no store's name: the name holds 'U'; ${name}";
  "lower store, no such store" =
    lower "layered:no" "no store \"no\" is declared here; declare it, or name another";
  "lower store, a slip" =
    stores
      {
        base.lowerStore = "/l";
        b.lowerStore = "layered:bsae";
      }
      [
        (of "b" "lowerStore = \"layered:bsae\": no store \"bsae\" is declared here; did you mean \"base\"?")
      ];
  "lower store, itself" =
    lower "layered:ci" "the store lies on itself (ci on ci); let one of them have a lower store of its own";
  "lower store, a loop" =
    stores
      {
        a.lowerStore = "layered:b";
        b.lowerStore = "layered:a";
      }
      [
        (of "a" "lowerStore = \"layered:b\": the store lies on itself (a on b on a); let one of them have a lower store of its own")
        (of "b" "lowerStore = \"layered:a\": the store lies on itself (b on a on b); let one of them have a lower store of its own")
      ];
  "lower store, somebody else's" =
    stores
      {
        a = {
          lowerStore = "/l";
          owner = "root";
        };
        b.lowerStore = "layered:a";
        c = {
          lowerStore = "layered:a";
          owner = "0";
        };
        d = {
          lowerStore = "layered:a";
          owner = "alice";
        };
      }
      [
        (of "d" "lowerStore = \"layered:a\": the store \"a\" belongs to root and this one to alice, and Nix opens both as one user; give both the same owner")
      ];
  "lower store, a third level" =
    stores
      {
        a.lowerStore = "/l";
        b.lowerStore = "layered:a";
        c.lowerStore = "layered:b";
      }
      [
        (of "c" "lowerStore = \"layered:b\": the kernel stacks at most 2 overlays and this would be number 3 (c on b on a); use the lower store of b instead")
      ];
  "lower store, a host without Nix" =
    onNixOS
      {
        imports = [ (layered { stores.ci.lowerStore = "daemon"; }) ];
        nix.enable = false;
      }
      [
        (of "ci" "lowerStore = \"daemon\": the store underneath is reached through this machine's Nix daemon, and nix.enable is false; set nix.enable = true, or name a store that needs no daemon, such as \"local\"")
      ];
  "lower store, letters beyond ASCII in a URL" =
    onNixOS (layered { stores.ci.lowerStore = "local?root=/l&x=ä"; })
      [
        (of "ci" "lowerStore = \"local?root=/l&x=ä\": it holds characters beyond ASCII; write them percent-encoded")
      ];

  # Lengths
  "root, long with what is below it" =
    let
      root = "/${repeat 249 "a"}";
    in
    ci { inherit root; } "root = ${quoted root}: with nix/store below it: the path is 260 bytes long; the kernel takes at most 254";
  "root, a long name of the unit" =
    let
      root = "/${repeat 100 "-"}";
    in
    ci { inherit root; } "root = ${quoted root}: the mount unit for ${root}/nix/store would have a name of 416 bytes, and systemd takes 255; use a shorter path, or one with fewer '-' (each counts four)";

  # Directories of two stores
  "directories, the same upper layer" =
    two "upperLayer" "/a/up" "it is also the upper-layer of store \"a\" (/a/up); ${own}";
  "directories, the same work dir" =
    two "workDir" "/a/work" "it is also the work-dir of store \"a\" (/a/work); ${own}";
  "directories, the same root" =
    two "root" "/a/root" "it is also the root of store \"a\" (/a/root); ${own}";
  "directories, a root that is an upper layer" =
    two "root" "/a/up" "it is also the upper-layer of store \"a\" (/a/up); ${own}";
  "directories, inside an upper layer" =
    two "upperLayer" "/a/up/x" "it lies inside the upper-layer of store \"a\" (/a/up); ${own}";
  "directories, inside a work dir" =
    two "root" "/a/work/x/y" "it lies inside the work-dir of store \"a\" (/a/work); ${own}";
  "directories, both of one store" =
    two "workDir" "/b/up" "it is also the upper-layer of the same store (/b/up); ${own}";
  "directories, one store's in another of its own" =
    two "workDir" "/b/up/work" "it lies inside the upper-layer of the same store (/b/up); ${own}";
  "directories, inside the lower store" =
    two "upperLayer" "/l/nix/store/up" "it lies inside the lower store's directory of store \"a\" (/l/nix/store); ${own}";
  "directories, the lower store is a store here" =
    two "lowerStore" "/a/root" "this is the store \"a\" of this configuration; write \"layered:a\"";
  "directories, the lower store inside the upper layer" =
    two "lowerStore" "/b/up" "the lower store's directory /b/up/nix/store lies inside the upper-layer of the same store (/b/up); a lower store has to lie apart";
  "directories, a default inside another store's" =
    stores
      {
        a = a // { root = "/var/lib/layered-stores/stores/b"; };
        b.lowerStore = "/l";
      }
      (
        map
          (
            { option, tail }:
            of "b" "${option} = \"/var/lib/layered-stores/stores/b/${tail}\": it lies inside the root of store \"a\" (/var/lib/layered-stores/stores/b); ${own}"
          )
          [
            {
              option = "root";
              tail = "root";
            }
            {
              option = "upperLayer";
              tail = "upper";
            }
            {
              option = "workDir";
              tail = "work";
            }
          ]
      );
  "directories, in an ephemeral store" =
    stores
      {
        tmp = {
          lowerStore = "/l";
          ephemeral.enable = true;
          ephemeral.size = "1G";
        };
        b = b // { upperLayer = "/var/lib/layered-stores/stores/tmp/mine"; };
      }
      [
        (of "b" "upperLayer = \"/var/lib/layered-stores/stores/tmp/mine\": it lies inside the filesystem of store \"tmp\" (/var/lib/layered-stores/stores/tmp); ${own}")
      ]
    // {
      words = false;
    };

  # Accounts and modes
  "owner, none" = ci { owner = ""; } "owner = \"\": not the name or number of an account";
  "owner, two words" = ci { owner = "a b"; } "owner = \"a b\": not the name or number of an account";
  "group, dash in front" = ci { group = "-x"; } "group = \"-x\": not the name or number of an account";
  "owner, no such user" =
    onNixOS
      {
        imports = [
          (layered {
            stores.ci.lowerStore = "/l";
            stores.ci.owner = "alice";
          })
        ];
        users.mutableUsers = false;
      }
      [
        (of "ci" "owner: there is no user \"alice\" in this configuration; declare it in users.users, or name another")
      ];
  "group, no such group" =
    onNixOS
      {
        imports = [
          (layered {
            stores.ci.lowerStore = "/l";
            stores.ci.group = "ci";
          })
        ];
        users.mutableUsers = false;
      }
      [
        (of "ci" "group: there is no group \"ci\" in this configuration; declare it in users.groups, or name another")
      ];
  "mode, for everybody" = ci { mode = "0777"; } "mode = \"0777\": ${everybody}";
  "mode, letters" = ci { mode = "rwx"; } "mode = \"rwx\": ${modeForm}";
  "mode, nothing for the owner" = ci { mode = "0055"; } "mode = \"0055\": ${modeForm}";
  "mode, a prefix" = ci { mode = "0o755"; } "mode = \"0o755\": ${modeForm}";
  "mode, five digits" = ci { mode = "17755"; } "mode = \"17755\": ${modeForm}";
}
// inOtherWords (
  {
    # Mount options
    "mount options, one that is not safe" = ci {
      mountOptions = [
        "noatime"
        "suid"
      ];
    } "mountOptions: \"suid\" is not among the mount options that can be chosen: noatime, nodiratime, relatime, strictatime, noexec";

    # Ephemeral stores
    "ephemeral, no size" =
      onNixOS
        (layered {
          stores.ci = {
            lowerStore = "/l";
            ephemeral.enable = true;
          };
        })
        [
          (of "ci" "ephemeral.size: an ephemeral store needs a size, or it could fill the memory; set it, for example to \"2G\"")
        ];
    "ephemeral, directories of its own" =
      stores
        {
          ci = {
            lowerStore = "/l";
            ephemeral.enable = true;
            ephemeral.size = "2G";
            root = "/srv/root";
            workDir = "/srv/work";
          };
        }
        [
          (of "ci" "root = \"/srv/root\": ${explicit}")
          (of "ci" "workDir = \"/srv/work\": ${explicit}")
        ];
  }
  // lib.mapAttrs' (
    _name: bad:
    lib.nameValuePair "ephemeral, the size ${bad}" (
      ci {
        ephemeral.enable = true;
        ephemeral.size = bad;
      } "ephemeral.size = \"${bad}\": ${size}"
    )
  ) (lib.genAttrs [ "" "2X" "0" "0%" "101%" "-1" "2GB" "1.5G" "0x10" ] (bad: bad))
  // {
    # A store's Nix daemon
    "daemon, a relative socket" =
      daemon { socketPath = "daemon.sock"; } "socketPath = \"daemon.sock\": the path is relative; give an absolute path";
    "daemon, a long socket" =
      let
        socketPath = "/run/${repeat 103 "a"}";
      in
      daemon { inherit socketPath; } "socketPath = ${quoted socketPath}: the path is 108 bytes long; a Unix socket's has at most 107";
    "daemon, one socket for two" =
      let
        served = {
          lowerStore = "/l";
          daemon.enable = true;
          daemon.socketPath = "/run/nix.sock";
          daemon.allowedGroups = [ "users" ];
        };
      in
      stores
        {
          a = served;
          b = served;
        }
        [
          (of "b" "daemon.socketPath = \"/run/nix.sock\": it is also the socket of store \"a\"; give each a socket of its own")
        ];
    "daemon, a mode of letters" = daemon { socketMode = "rw"; } "socketMode = \"rw\": ${socketForm}";
    "daemon, a mode with another digit" =
      daemon { socketMode = "0686"; } "socketMode = \"0686\": ${socketForm}";
    "daemon, two users in one" =
      daemon { allowedUsers = [ "alice bob" ]; } "allowedUsers: \"alice bob\" ${nixUser}";
    "daemon, a group without a name" =
      daemon { allowedGroups = [ "" ]; } "allowedUsers: \"@\" ${nixUser}";
    "daemon, a trusted user without a name" =
      daemon { trustedUsers = [ "" ]; } "trustedUsers: \"\" ${nixUser}";
    "daemon, a store in the settings" =
      nix { store = "/l"; } "store: the daemon is given its store by itself; take the setting away";
    "daemon, experimental features" =
      nix { experimental-features = [ "flakes" ]; } "experimental-features: what the store needs is set by itself; name further ones with extra-experimental-features";
    "daemon, allowed users in the settings" =
      nix { allowed-users = [ "*" ]; } "allowed-users: ${allowed}";
    "daemon, more allowed users in the settings" =
      nix { extra-allowed-users = [ "*" ]; } "extra-allowed-users: ${allowed}";
    "daemon, trusted users in the settings" =
      nix { trusted-users = [ "*" ]; } "trusted-users: ${trusted}";
    "daemon, more trusted users in the settings" =
      nix { extra-trusted-users = [ "*" ]; } "extra-trusted-users: ${trusted}";
    "daemon, hard links" =
      nix { auto-optimise-store = true; } "auto-optimise-store: it would replace files of the upper layer by hard links; set it to false, or take it away";
    "daemon, collecting when space is short" = nix { min-free = 1; } "min-free: ${counts}";
    "daemon, collecting until there is space" = nix { max-free = 1; } "max-free: ${counts}";
    "daemon, a setting with a line break" =
      nix { builders = "a\nstore = b"; } "builders: the value ${oneLine}";
    "daemon, settings with a line break" =
      nix { substituters = [ "a\nb" ]; } "substituters: each of these ${oneLine}";
    "daemon, a setting's name" =
      nix { "max jobs" = 1; } "\"max jobs\": the name of a Nix setting has lower-case letters, digits and '-' only";
  }
)
// {
  # Settings without options
  "settings, an unknown table" = settings { stors = { }; } [
    "services.layeredStores.settings.stors: unknown key \"stors\"; did you mean \"stores\"?"
  ];
  "settings, an unknown key" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          workdir = "/w";
        };
      }
      [
        "services.layeredStores.settings.stores.ci.workdir: unknown key \"workdir\"; did you mean \"work-dir\"?"
      ];
  "settings, no lower store" = settings { stores.ci = { }; } [
    "services.layeredStores.settings.stores.ci.lower-store: key \"lower-store\" is missing; name the store underneath, for example \"daemon\""
  ];
  "settings, a store that is none" = settings { stores.ci = 1; } [
    "services.layeredStores.settings.stores.ci: a table is expected here, not an integer"
  ];
  "settings, a key of two letters too few" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          uper-laye = "/u";
        };
      }
      [
        "services.layeredStores.settings.stores.ci.uper-laye: unknown key \"uper-laye\"; did you mean \"upper-layer\"?"
      ];
  "settings, the first word of a key" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          work = "/w";
        };
      }
      [
        "services.layeredStores.settings.stores.ci.work: unknown key \"work\"; did you mean \"work-dir\"?"
      ];
  "settings, a key that is like none" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          colour = "red";
        };
      }
      [
        "services.layeredStores.settings.stores.ci.colour: unknown key \"colour\"; the keys are lower-store, root, upper-layer, work-dir, owner, group, mode, required, autostart, mount-options, ephemeral-size, daemon"
      ];
  "settings, keys of a table below" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          daemon.allowed-user = [ ];
          daemon.setting = { };
        };
      }
      [
        "services.layeredStores.settings.stores.ci.daemon.allowed-user: unknown key \"daemon.allowed-user\"; did you mean \"allowed-users\"?"
        "services.layeredStores.settings.stores.ci.daemon.setting: unknown key \"daemon.setting\"; did you mean \"settings\"?"
      ];
  "settings, a control character" =
    nix { substituters = "${builtins.fromJSON "\"\\u001b\""}[2J"; }
      "substituters: the value holds a control character; take it away";
  "lower store, a control character" =
    lower "unix:///run/x${builtins.fromJSON "\"\\u001b\""}" (control "\\u{1b}");
  "lower store, an encoded control character" = lower "unix:///run/%1b[2J" (control "\\u{1b}");
  "lower store, an encoded NUL" = lower "local?root=/x&log=/l%00" (control "\\0");
  "lower store, an encoded line break" = lower "local?root=/x&log%0a=/l" (control "\\n");
  "lower store, delete" = lower "unix:///run/%7f" (control "\\u{7f}");

  # What opens the stores
  "Nix before 2.26" = withNix (nixOf "nix" "2.24.14") [
    "nix.package is Nix 2.24.14, and layered stores need 2.26 or newer; set it to a newer one, for example to pkgs.nixVersions.latest"
  ];
  "Lix" = withNix (nixOf "lix" "2.93.0") [
    "nix.package is Lix 2.93.0, which has no local-overlay stores; set it to a Nix, for example to pkgs.nixVersions.latest"
  ];
  # Not refused:
  "Nix, what became 2.26" = withNix (nixOf "nix" "2.26.0pre20241220_abcdef") [ ];
  "Nix, of an unknown version" = withNix (withoutVersion // { name = "mine"; }) [ ];
  "Nix, without a name" = withNix withoutVersion [ ];
  "Nix, not used" =
    onNixOS
      {
        imports = [ one ];
        nix.package = nixOf "nix" "2.18.1";
        nix.enable = false;
      }
      [ ];
  "settings, values of other types" =
    settings
      {
        stores.ci = {
          lower-store = [ "/l" ];
          required = "yes";
          mode = 755;
        };
      }
      [
        "services.layeredStores.settings.stores.ci.lower-store: a string is expected here, not an array"
        "services.layeredStores.settings.stores.ci.mode: a string is expected here, not an integer"
        "services.layeredStores.settings.stores.ci.required: true or false is expected here, not a string"
      ];
  "settings, a list that is none" =
    settings
      {
        stores.ci = {
          lower-store = "/l";
          mount-options = "noatime";
          daemon.settings.max-jobs.a = 1;
        };
      }
      [
        "services.layeredStores.settings.stores.ci.mount-options: a list of strings is expected here, not a string"
        "services.layeredStores.settings.stores.ci.daemon.settings.max-jobs: a string, an integer, true, false or a list of strings is expected here, not a table"
      ]
    // {
      words = false;
    };
  "settings, one that an option would have had right" =
    refusal
      (layered {
        stores.ci.lowerStore = "/l";
        settings.stores.ci.root = "root";
      })
      [
        "services.layeredStores.settings.stores.ci.root = \"root\": the path is relative; give an absolute path"
      ];

  # Several at once
  "everything is said, not only the first" =
    stores
      {
        a = {
          lowerStore = "ssh://host";
          mode = "0777";
        };
        b = {
          lowerStore = "layered:a";
          upperLayer = "up";
        };
      }
      [
        (of "a" "lowerStore = \"ssh://host\": ${noDirectory "ssh"}")
        (of "a" "mode = \"0777\": ${everybody}")
        (of "b" "upperLayer = \"up\": the path is relative; give an absolute path")
      ];
}
