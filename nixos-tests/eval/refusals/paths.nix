# Names and directories.
{ lib, words }:

let
  inherit (words)
    asserted
    atBuild
    characters
    ci
    optionOf
    quoted
    repeat
    said
    stores
    typed
    value
    ;

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
