# The store underneath.
{ lib, words }:

let
  inherit (words)
    asserted
    atBuild
    characters
    ci
    escape
    missing
    noDirectory
    optionOf
    quoted
    said
    stores
    value
    ;

  lower =
    text: sentence:
    atBuild (ci { lowerStore = text; }) [ (value "lower-store" text sentence) ];
  control = shown: "it holds '${shown}', as it is or percent-encoded, which no store's URL has to; take it away";
  onItself = chain: "the store lies on itself (${chain}); let one of them have a lower store of its own";
  refers = name: text: sentence: "${optionOf name "lowerStore"} = ${quoted text}: ${sentence}";
in
lib.mapAttrs' (name: lib.nameValuePair "lower store, ${name}") {
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
