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
  words = import ./words.nix { inherit lib layered; };
  inherit (words)
    asserted
    atBuild
    ci
    everybody
    modeForm
    noDirectory
    optionOf
    said
    stores
    typed
    value
    ;

  explicit =
    "an ephemeral store has all of its directories on a filesystem of its own; take this away, or "
    + "ephemeral-size";

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
import ./paths.nix { inherit lib words; }
// import ./lower-store.nix { inherit lib words; }
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

  # Garbage collection
  "gc, an option that is no use" = typed "gc.options" { gc.options = "--max-freed 1G"; };
  "gc, an option without its value" = typed "gc.options" { gc.options = "--until-free"; };
  "gc, one for its value" = typed "gc.options" { gc.options = "--until-free --older-than 3d"; };
  "gc, several lines" = typed "gc.options" { gc.options = "--until-free 1G\n"; };

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
// import ./daemon.nix { inherit lib words; }
// import ./settings.nix { inherit lib layered words; }
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
