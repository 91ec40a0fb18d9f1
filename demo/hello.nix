let
  build = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-ec" script ];
    PATH = "/usr/bin";
  };
  program = name: word: build name ''
    mkdir -p $out/bin
    echo "#!/bin/sh" >$out/bin/${name}
    echo "echo '${word}' \$(cat ${greeting})" >>$out/bin/${name}
    chmod +x $out/bin/${name}
    exit # chmod must not be the last process: it closes the log, and Nix kills who does that
  '';
  greeting = build "greeting" "echo from two layers >$out";
in
{
  inherit greeting;
  hello = program "hello" "Hello";
  goodbye = program "goodbye" "Goodbye";
}
