# Any store will do: what is looked at is the D-Bus API.
{
  name = "layered-stores-introspection";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores.example.lowerStore = "local";
  };

  testScript = builtins.readFile ./introspection.py;
}
