# No store: the script writes its configurations itself.
{
  name = "layered-stores-many";

  nodes.machine = {
    imports = [ ./machine.nix ];
  };

  testScript = builtins.readFile ./many.py;
}
