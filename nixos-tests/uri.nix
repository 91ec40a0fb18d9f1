# `layered-stores uri`: what it prints works for every command of Nix, or for none.
{
  name = "layered-stores-uri";

  nodes.machine = {
    imports = [ ./machine.nix ];

    services.layeredStores.stores = {
      ci = {
        lowerStore = "/srv/base";
        daemon = {
          enable = true;
          allowedUsers = [ "alice" ];
        };
      };
      plain = {
        lowerStore = "/srv/base";
        autostart = false;
      };
      broken = {
        lowerStore = "/srv/nowhere";
        required = false;
      };
      hosted = {
        lowerStore = "daemon";
        required = false;
      };
      direct = {
        lowerStore = "local";
        required = false;
      };
    };
  };

  testScript = builtins.readFile ./uri.py;
}
