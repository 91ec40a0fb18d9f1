# No store: the script writes its configurations itself.
{
  name = "layered-stores-mistakes";

  nodes.machine = {
    imports = [ ./machine.nix ];
  };

  testScript = builtins.readFile ./mistakes.py;
}
