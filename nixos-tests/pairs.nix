# Stores whose directories are exchanged, copied, mistyped, or mounted twice.
{
  name = "layered-stores-pairs";

  nodes.machine = {
    imports = [ ./machine.nix ];

    # The scenario declares its stores one after the other.
    services.layeredStores.stores.plain = {
      lowerStore = "local";
      autostart = false;
    };
  };

  testScript = builtins.readFile ./pairs.py;
}
