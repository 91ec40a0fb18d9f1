# Configurations that are refused, and where, with all that is said about each:
#
#   types       the options whose types do not take what they are given
#   assertions  what is said while a system is evaluated
#   build       what `layered-stores check-config` says about the rendered file while it is built
#
# One of them has something to say about each, or a configuration got past them all. What is left to
# the last has to be evaluated without complaint, or nobody would come to read what it says.
{
  lib,
  nixos,
  layered,
}:

let
  refusal =
    where: what: configuration:
    {
      inherit configuration;
      types = [ ];
      assertions = [ ];
      build = [ ];
    }
    // {
      ${where} = what;
    };
  atBuild = lib.flip (refusal "build");
  asserted = lib.flip (refusal "assertions");
  stores = stores: layered { inherit stores; };

  # A store that is sound but for what is given.
  ci = more: stores { ci = { lowerStore = "/l"; } // more; };
  served =
    more:
    ci {
      daemon = {
        enable = true;
        allowedGroups = [ "users" ];
      }
      // more;
    };
  typed = option: more: refusal "types" [ (optionOf "ci" option) ] (ci more);

  optionOf = name: option: "services.layeredStores.stores.${name}.${option}";
  # What the daemon says about a key: `store "ci": mode (services.….mode) = "rwx": …`.
  said =
    name: key: sentence:
    "store \"${name}\": ${key} (${
      lib.concatMapStringsSep " or " (optionOf name) (lib.toList options.${key} or key)
    })${sentence}";
  options = {
    lower-store = "lowerStore";
    upper-layer = "upperLayer";
    work-dir = "workDir";
    mount-options = "mountOptions";
    ephemeral-size = "ephemeral.size";
    "daemon.socket-path" = "daemon.socketPath";
    "daemon.socket-mode" = "daemon.socketMode";
    "daemon.allowed-users" = [
      "daemon.allowedUsers"
      "daemon.allowedGroups"
    ];
    "daemon.trusted-users" = "daemon.trustedUsers";
    "daemon.settings.max jobs" = "daemon.settings.\"max jobs\"";
  };
  value = key: value: sentence: said "ci" key " = ${quoted value}: ${sentence}";
  missing =
    "store \"ci\": key \"lower-store\" (${optionOf "ci" "lowerStore"}) is missing; name the store "
    + "underneath, for example \"daemon\"";
  quoted = builtins.toJSON;
  repeat = count: text: lib.concatStrings (lib.genList (_index: text) count);
  escape = builtins.fromJSON "\"\\u001b\"";

  # Every path is read in the same way. `null` is for the type to say.
  paths = {
    "empty" = {
      path = "";
      sentence = null;
    };
    "relative" = {
      path = "upper";
      sentence = null;
    };
    "in the Nix store" = {
      path = "${builtins.storeDir}/00000000000000000000000000000000-upper";
      sentence = null;
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
  everyPath = lib.concatMapAttrs (
    key: option:
    lib.mapAttrs' (
      name:
      { path, sentence }:
      lib.nameValuePair "${option}, ${name}" (
        if sentence == null then
          typed option { ${option} = path; }
        else
          atBuild (ci { ${option} = path; }) [ (value key path sentence) ]
      )
    ) paths
  ) {
    root = "root";
    upper-layer = "upperLayer";
    work-dir = "workDir";
  };

  # Names
  named =
    name:
    asserted (stores { ${name}.lowerStore = "/l"; }) [
      "services.layeredStores.stores: ${quoted name} is no name for a store; use lower-case letters, digits and '-', at most 64 of them, and no '-' in front"
    ];

  # Lower stores
  lower =
    text: sentence:
    atBuild (ci { lowerStore = text; }) [ (value "lower-store" text sentence) ];
  noDirectory =
    scheme:
    "a \"${scheme}\" store has no directory on this machine; an overlay needs one: use a root "
    + "directory, \"daemon\", \"local\" or \"layered:NAME\"";
  control = shown: "it holds '${shown}', as it is or percent-encoded, which no store's URL has to; take it away";
  onItself = chain: "the store lies on itself (${chain}); let one of them have a lower store of its own";
  refers = name: text: sentence: "${optionOf name "lowerStore"} = ${quoted text}: ${sentence}";

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
    option: value:
    stores {
      inherit a;
      b = b // { ${option} = value; };
    };
  notApart =
    name: option: path: other: otherOption: otherPath:
    "${optionOf name option}: ${path} is not apart from ${otherPath}, which is "
    + "${optionOf other otherOption}; give each a directory of its own";
  # The same directory is told of on both sides.
  same =
    name: option: other: otherOption: path:
    [
      (notApart other otherOption path name option path)
      (notApart name option path other otherOption path)
    ];

  modeForm = "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";
  everybody = "everybody could write into the store; take the last digit's 2 away";
  explicit =
    "an ephemeral store has all of its directories on a filesystem of its own; take this away, or "
    + "ephemeral-size";

  # A store's Nix daemon
  nix =
    settings: key: sentence:
    atBuild (served { inherit settings; }) [ (said "ci" "daemon.settings.${key}" ": ${sentence}") ];
  nixUser = "is not a user's name, a group's as \"@group\", or \"*\" for everybody";
  counts =
    "Nix counts wrongly how much is freed in a layered store, and would delete more than is asked "
    + "for; take the setting away";
  allowed = "this is set with daemon.allowed-users; take the setting away";
  trusted = "this is set with daemon.trusted-users; take the setting away";
  oneLine = "the value has to be one line; take the line break away";

  # Without an option: the keys of `settings`.
  settings = table: layered { settings.stores.ci = { lower-store = "/l"; } // table; };
  unknown =
    key: hint:
    "store \"ci\": unknown key \"${key}\" (services.layeredStores.settings.stores.ci.${key}); ${hint}";

  # What opens the stores
  withNix =
    pname: version:
    asserted {
      imports = [ (stores { ci.lowerStore = "local"; }) ];
      nix.package = nixos.installed pname version;
    };
  withoutAccount =
    more:
    asserted {
      imports = [ (ci more) ];
      users.mutableUsers = false;
    };
in
everyPath
// lib.mapAttrs' (name: text: lib.nameValuePair "name, ${name}" (named text)) {
  "capital letter" = "CI";
  "underscore" = "a_b";
  "dash in front" = "-a";
  "empty" = "";
  "long" = repeat 65 "a";
  "slash" = "a/b";
}
// lib.mapAttrs' (name: lib.nameValuePair "lower store, ${name}") {
  "none" = atBuild (stores { ci = { }; }) [ missing ];
  "empty" =
    lower "" "it is empty; name a root directory, a Nix store URL such as \"daemon\", or \"layered:NAME\"";
  "the root directory" =
    lower "/" "the host's own store is written \"daemon\" (through its daemon) or \"local\" (directly)";
  "another machine" = lower "ssh-ng://host" (noDirectory "ssh-ng");
  "a binary cache" = lower "https://cache.example.org" (noDirectory "https");
  "a word" = lower "host" (noDirectory "host");
  "relative" = lower "./base" "the path is relative; give an absolute path";
  "relative root" = lower "local?root=base" "the path is relative; give an absolute path";
  "trailing slash" = lower "/l/" "the path ends in '/'; leave the last '/' away";
  "blank" = lower "/l l" "the path holds ' '; ${characters}";
  "escaped blank" = lower "local?root=/l%20l" "the path holds ' '; ${characters}";
  "another store directory" =
    lower "local?store=/gnu/store" "its store directory is \"/gnu/store\"; a layered store needs one that is \"/nix/store\"";
  "a control character" = atBuild (ci { lowerStore = "unix:///run/x${escape}"; }) [
    (said "ci" "lower-store" " = \"unix:///run/x\\u{1b}\": ${control "\\u{1b}"}")
  ];
  "an encoded control character" = lower "unix:///run/%1b[2J" (control "\\u{1b}");
  "an encoded NUL" = lower "local?root=/x&log=/l%00" (control "\\0");
  "an encoded line break" = lower "local?root=/x&log%0a=/l" (control "\\n");
  "delete" = lower "unix:///run/%7f" (control "\\u{7f}");

  "no name" = asserted (ci { lowerStore = "layered:UP"; }) [
    (refers "ci" "layered:UP" "no store \"UP\" is declared here; declare it, or name another")
  ];
  "no such store" = asserted (ci { lowerStore = "layered:no"; }) [
    (refers "ci" "layered:no" "no store \"no\" is declared here; declare it, or name another")
  ];
  "a slip" =
    asserted
      (stores {
        base.lowerStore = "/l";
        b.lowerStore = "layered:bsae";
      })
      [ (refers "b" "layered:bsae" "no store \"bsae\" is declared here; declare it, or name another") ];
  "itself" = asserted (ci { lowerStore = "layered:ci"; }) [
    (refers "ci" "layered:ci" (onItself "ci on ci"))
  ];
  "a loop" =
    asserted
      (stores {
        a.lowerStore = "layered:b";
        b.lowerStore = "layered:a";
      })
      [
        (refers "a" "layered:b" (onItself "a on b on a"))
        (refers "b" "layered:a" (onItself "b on a on b"))
      ];
  "somebody else's" =
    atBuild
      (stores {
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
      })
      [
        (said "d" "lower-store" " = \"layered:a\": the store \"a\" belongs to root and this one to alice, and Nix opens both as one user; give both the same owner")
      ];
  "a third level" =
    atBuild
      (stores {
        a.lowerStore = "/l";
        b.lowerStore = "layered:a";
        c.lowerStore = "layered:b";
      })
      [
        (said "c" "lower-store" " = \"layered:b\": the kernel stacks at most 2 overlays and this would be number 3 (c on b on a); use the lower store of b instead")
      ];
  "a host without Nix" =
    asserted
      {
        imports = [ (ci { lowerStore = "daemon"; }) ];
        nix.enable = false;
      }
      [
        (refers "ci" "daemon" "the store underneath is reached through this machine's Nix daemon, and nix.enable is false; set nix.enable = true, or name a store that needs no daemon, such as \"local\"")
      ];
  "letters beyond ASCII in a URL" = asserted (ci { lowerStore = "local?root=/l&x=ä"; }) [
    (refers "ci" "local?root=/l&x=ä" "it holds characters beyond ASCII; write them percent-encoded")
  ];
}
// {
  # Lengths
  "root, long with what is below it" =
    let
      root = "/${repeat 249 "a"}";
    in
    atBuild (ci { inherit root; }) [
      (value "root" root "with nix/store below it: the path is 260 bytes long; the kernel takes at most 254")
    ];
  "root, a long name of the unit" =
    let
      root = "/${repeat 100 "-"}";
    in
    atBuild (ci { inherit root; }) [
      (value "root" root "the mount unit for ${root}/nix/store would have a name of 416 bytes, and systemd takes 255; use a shorter path, or one with fewer '-' (each counts four)")
    ];
}
// lib.mapAttrs' (name: lib.nameValuePair "directories, ${name}") {
  "the same upper layer" = asserted (two "upperLayer" "/a/up") (
    same "b" "upperLayer" "a" "upperLayer" "/a/up"
  );
  "the same work dir" = asserted (two "workDir" "/a/work") (
    same "b" "workDir" "a" "workDir" "/a/work"
  );
  "the same root" = asserted (two "root" "/a/root") (same "b" "root" "a" "root" "/a/root");
  "a root that is an upper layer" = asserted (two "root" "/a/up") (
    same "b" "root" "a" "upperLayer" "/a/up"
  );
  "inside an upper layer" = asserted (two "upperLayer" "/a/up/x") [
    (notApart "b" "upperLayer" "/a/up/x" "a" "upperLayer" "/a/up")
  ];
  "inside a work dir" = asserted (two "root" "/a/work/x/y") [
    (notApart "b" "root" "/a/work/x/y" "a" "workDir" "/a/work")
  ];
  "both of one store" = asserted (two "workDir" "/b/up") (
    same "b" "workDir" "b" "upperLayer" "/b/up"
  );
  "one store's in another of its own" = asserted (two "workDir" "/b/up/work") [
    (notApart "b" "workDir" "/b/up/work" "b" "upperLayer" "/b/up")
  ];
  "a default inside another store's" =
    let
      root = "/var/lib/layered-stores/stores/b";
    in
    asserted
      (stores {
        a = a // { inherit root; };
        b.lowerStore = "/l";
      })
      [
        (notApart "b" "root" "${root}/root" "a" "root" root)
        (notApart "b" "upperLayer" "${root}/upper" "a" "root" root)
        (notApart "b" "workDir" "${root}/work" "a" "root" root)
      ];
  "in an ephemeral store" =
    let
      upperLayer = "/var/lib/layered-stores/stores/tmp/mine";
    in
    asserted
      (stores {
        tmp = {
          lowerStore = "/l";
          ephemeral.enable = true;
          ephemeral.size = "1G";
        };
        b = b // { inherit upperLayer; };
      })
      [
        (notApart "b" "upperLayer" upperLayer "tmp" "ephemeral.size" "/var/lib/layered-stores/stores/tmp")
      ];
  "inside the lower store" = atBuild (two "upperLayer" "/l/nix/store/up") [
    (said "b" "upper-layer" " = \"/l/nix/store/up\": it lies inside the lower store's directory of store \"a\" (/l/nix/store); give each a directory of its own")
  ];
  "the lower store is a store here" = atBuild (two "lowerStore" "/a/root") [
    (said "b" "lower-store" " = \"/a/root\": this is the store \"a\" of this configuration; write \"layered:a\"")
  ];
  "the lower store inside the upper layer" = atBuild (two "lowerStore" "/b/up") [
    (said "b" "lower-store" " = \"/b/up\": the lower store's directory /b/up/nix/store lies inside the upper-layer of the same store (/b/up); a lower store has to lie apart")
  ];
}
// {
  # Accounts and modes
  "owner, none" = atBuild (ci { owner = ""; }) [
    (value "owner" "" "not the name or number of an account")
  ];
  "owner, two words" = atBuild (ci { owner = "a b"; }) [
    (value "owner" "a b" "not the name or number of an account")
  ];
  "group, dash in front" = atBuild (ci { group = "-x"; }) [
    (value "group" "-x" "not the name or number of an account")
  ];
  "owner, no such user" = withoutAccount { owner = "alice"; } [
    "${optionOf "ci" "owner"}: there is no user \"alice\" in this configuration; declare it in users.users, or name another"
  ];
  "group, no such group" = withoutAccount { group = "ci"; } [
    "${optionOf "ci" "group"}: there is no group \"ci\" in this configuration; declare it in users.groups, or name another"
  ];
  "mode, for everybody" = atBuild (ci { mode = "0777"; }) [ (value "mode" "0777" everybody) ];
  "mode, letters" = typed "mode" { mode = "rwx"; };
  "mode, nothing for the owner" = atBuild (ci { mode = "0055"; }) [ (value "mode" "0055" modeForm) ];
  "mode, a prefix" = typed "mode" { mode = "0o755"; };
  "mode, five digits" = typed "mode" { mode = "17755"; };

  # Mount options
  "mount options, one that is not safe" = typed "mountOptions" {
    mountOptions = [
      "noatime"
      "suid"
    ];
  };

  # Ephemeral stores
  "ephemeral, no size" = asserted (ci { ephemeral.enable = true; }) [
    "${optionOf "ci" "ephemeral.size"}: an ephemeral store needs a size, or it could fill the memory; set it, for example to \"2G\""
  ];
  "ephemeral, directories of its own" =
    atBuild
      (ci {
        ephemeral.enable = true;
        ephemeral.size = "2G";
        root = "/srv/root";
        workDir = "/srv/work";
      })
      [
        (value "root" "/srv/root" explicit)
        (value "work-dir" "/srv/work" explicit)
      ];
}
// lib.listToAttrs (
  map
    (
      size:
      lib.nameValuePair "ephemeral, the size ${size}" (
        typed "ephemeral.size" {
          ephemeral.enable = true;
          ephemeral.size = size;
        }
      )
    )
    [
      ""
      "2X"
      "0"
      "0%"
      "101%"
      "-1"
      "2GB"
      "1.5G"
      "0x10"
    ]
)
// lib.mapAttrs' (name: lib.nameValuePair "daemon, ${name}") {
  "a relative socket" = typed "daemon.socketPath" { daemon.socketPath = "daemon.sock"; };
  "a long socket" =
    let
      socketPath = "/run/${repeat 103 "a"}";
    in
    atBuild (served { inherit socketPath; }) [
      (value "daemon.socket-path" socketPath "the path is 108 bytes long; a Unix socket's has at most 107")
    ];
  "one socket for two" =
    let
      served = {
        lowerStore = "/l";
        daemon.enable = true;
        daemon.socketPath = "/run/nix.sock";
        daemon.allowedGroups = [ "users" ];
      };
    in
    atBuild
      (stores {
        a = served;
        b = served;
      })
      [
        (said "b" "daemon.socket-path" " = \"/run/nix.sock\": it is also the socket of store \"a\"; give each a socket of its own")
      ];
  "a mode of letters" = typed "daemon.socketMode" { daemon.socketMode = "rw"; };
  "a mode with another digit" = typed "daemon.socketMode" { daemon.socketMode = "0686"; };
  "two users in one" = atBuild (served { allowedUsers = [ "alice bob" ]; }) [
    (said "ci" "daemon.allowed-users" ": \"alice bob\" ${nixUser}")
  ];
  "a group without a name" = atBuild (served { allowedGroups = [ "" ]; }) [
    (said "ci" "daemon.allowed-users" ": \"@\" ${nixUser}")
  ];
  "a trusted user without a name" = atBuild (served { trustedUsers = [ "" ]; }) [
    (said "ci" "daemon.trusted-users" ": \"\" ${nixUser}")
  ];
  "a store in the settings" =
    nix { store = "/l"; } "store" "the daemon is given its store by itself; take the setting away";
  "experimental features" =
    nix { experimental-features = [ "flakes" ]; } "experimental-features"
      "what the store needs is set by itself; name further ones with extra-experimental-features";
  "allowed users in the settings" = nix { allowed-users = [ "*" ]; } "allowed-users" allowed;
  "more allowed users in the settings" =
    nix { extra-allowed-users = [ "*" ]; } "extra-allowed-users" allowed;
  "trusted users in the settings" = nix { trusted-users = [ "*" ]; } "trusted-users" trusted;
  "more trusted users in the settings" =
    nix { extra-trusted-users = [ "*" ]; } "extra-trusted-users" trusted;
  "hard links" =
    nix { auto-optimise-store = true; } "auto-optimise-store"
      "it would replace files of the upper layer by hard links; set it to false, or take it away";
  "collecting when space is short" = nix { min-free = 1; } "min-free" counts;
  "collecting until there is space" = nix { max-free = 1; } "max-free" counts;
  "a setting with a line break" = nix { builders = "a\nstore = b"; } "builders" oneLine;
  "settings with a line break" = nix { substituters = [ "a\nb" ]; } "substituters" oneLine;
  "a setting with a control character" =
    nix { substituters = "${escape}[2J"; } "substituters"
      "the value holds a control character; take it away";
  "a setting's name" =
    nix { "max jobs" = 1; } "max jobs"
      "the name of a Nix setting has lower-case letters, digits and '-' only";
  "a setting that is no value of Nix" = typed "daemon.settings.max-jobs" { daemon.settings.max-jobs = 1.5; };
}
// lib.mapAttrs' (name: lib.nameValuePair "settings, ${name}") {
  "an unknown table" = atBuild (layered { settings.stors = { }; }) [
    "unknown key \"stors\" (services.layeredStores.settings.stors); did you mean \"stores\"?"
  ];
  "an unknown key" = atBuild (settings { workdir = "/w"; }) [
    (unknown "workdir" "did you mean \"work-dir\"?")
  ];
  "no lower store" = atBuild (layered { settings.stores.ci = { }; }) [ missing ];
  "a store that is none" = atBuild (layered { settings.stores.ci = 1; }) [
    "store \"ci\": a table is expected here, not an integer"
  ];
  "a key of two letters too few" = atBuild (settings { uper-laye = "/u"; }) [
    (unknown "uper-laye" "did you mean \"upper-layer\"?")
  ];
  "the first word of a key" = atBuild (settings { work = "/w"; }) [
    (unknown "work" "did you mean \"work-dir\"?")
  ];
  "a key that is like none" = atBuild (settings { colour = "red"; }) [
    (unknown "colour" "the keys are lower-store, root, upper-layer, work-dir, owner, group, mode, required, autostart, mount-options, ephemeral-size, daemon")
  ];
  "keys of a table below" =
    atBuild
      (settings {
        daemon.allowed-user = [ ];
        daemon.setting = { };
      })
      [
        (unknown "daemon.allowed-user" "did you mean \"allowed-users\"?")
        (unknown "daemon.setting" "did you mean \"settings\"?")
      ];
  "values of other types" =
    atBuild
      (settings {
        lower-store = [ "/l" ];
        required = "yes";
        mode = 755;
      })
      [
        (said "ci" "lower-store" ": a string is expected here, not an array")
        (said "ci" "mode" ": a string is expected here, not an integer")
        (said "ci" "required" ": true or false is expected here, not a string")
      ];
  "a list that is none" =
    atBuild
      (settings {
        mount-options = "noatime";
        daemon.settings.max-jobs.a = 1;
      })
      [
        (said "ci" "mount-options" ": a list of strings is expected here, not a string")
        (said "ci" "daemon.settings.max-jobs" ": a string, an integer, true, false or a list of strings is expected here, not a table")
      ];
  # The types of the options are not asked.
  "one that an option would have had right" =
    atBuild
      (layered {
        stores.ci.lowerStore = "/l";
        settings.stores.ci.root = "root";
      })
      [ (value "root" "root" "the path is relative; give an absolute path") ];
  "each that a type would have refused" =
    atBuild
      (settings {
        mode = "rwx";
        mount-options = [ "suid" ];
        ephemeral-size = "2X";
        daemon.socket-path = "daemon.sock";
        daemon.socket-mode = "rw";
      })
      [
        (value "ephemeral-size" "2X" "a size is a number of bytes, with K, M, G or T behind it for powers of 1024, or a part of the memory from \"1%\" to \"100%\"")
        (value "mode" "rwx" modeForm)
        (said "ci" "mount-options" ": \"suid\" is not among the mount options that can be chosen: noatime, nodiratime, relatime, strictatime, noexec")
        (value "daemon.socket-mode" "rw" "a mode is three or four octal digits, such as \"0666\"")
        (value "daemon.socket-path" "daemon.sock" "the path is relative; give an absolute path")
      ];
}
// {
  # What opens the stores
  "Nix before 2.26" = withNix "nix" "2.24.14" [
    "nix.package is Nix 2.24.14, and layered stores need 2.26 or newer; set it to a newer one, for example to pkgs.nixVersions.latest"
  ];
  "Lix" = withNix "lix" "2.93.0" [
    "nix.package is Lix 2.93.0, which has no local-overlay stores; set it to a Nix, for example to pkgs.nixVersions.latest"
  ];

  # Several at once
  "everything is said, not only the first" =
    atBuild
      (stores {
        a = {
          lowerStore = "ssh://host";
          mode = "0777";
        };
        b = {
          lowerStore = "layered:a";
          upperLayer = "/up/";
        };
      })
      [
        (said "a" "lower-store" " = \"ssh://host\": ${noDirectory "ssh"}")
        (said "a" "mode" " = \"0777\": ${everybody}")
        (said "b" "upper-layer" " = \"/up/\": the path ends in '/'; leave the last '/' away")
      ];
}
