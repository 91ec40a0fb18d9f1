# Without an option: the keys of `settings`.
{
  lib,
  layered,
  words,
}:

let
  inherit (words)
    atBuild
    missing
    modeForm
    said
    value
    ;

  settings = table: layered { settings.stores.ci = { lower-store = "/l"; } // table; };
  unknown =
    key: hint:
    "store \"ci\": unknown key \"${key}\" (services.layeredStores.settings.stores.ci.${key}); ${hint}";
in
lib.mapAttrs' (name: lib.nameValuePair "settings, ${name}") {
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
    (unknown "colour" "the keys are lower-store, root, upper-layer, work-dir, owner, group, mode, required, autostart, leases, mount-options, ephemeral-size, daemon")
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
        (said "ci" "mode" ": a string is expected here, not an integer; write \"755\"")
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
