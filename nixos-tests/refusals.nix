# No store: the script writes its configurations itself.
{
  name = "layered-stores-refusals";

  nodes.machine = {
    imports = [ ./machine.nix ];
  };

  testScript = builtins.readFile ./refusals.py;
}
