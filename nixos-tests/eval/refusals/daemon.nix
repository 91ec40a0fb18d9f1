# A store's Nix daemon.
{ lib, words }:

let
  inherit (words)
    atBuild
    escape
    repeat
    said
    served
    stores
    typed
    value
    ;

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
in
lib.mapAttrs' (name: lib.nameValuePair "daemon, ${name}") {
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
