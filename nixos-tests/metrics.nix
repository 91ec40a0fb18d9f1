# Two stores, and a Prometheus that asks a node exporter about them.
{
  name = "layered-stores-metrics";

  nodes.machine =
    { lib, pkgs, ... }:
    let
      # A part of Nixpkgs, which is enough to evaluate the module, may be without it.
      has = place: builtins.pathExists (pkgs.path + "/pkgs/${place}");
      hasPrometheus = lib.any has [
        "by-name/pr/prometheus"
        "servers/monitoring/prometheus"
      ];
    in
    {
      imports = [ ./machine.nix ];

      services.layeredStores = {
        metrics.enable = true;
        metrics.textfile = "/var/lib/prometheus/node-exporter/layered-stores.prom";
        stores = {
          ci = {
            lowerStore = "/srv/base";
            root = "/srv/ci/root";
            upperLayer = "/srv/ci/upper";
            workDir = "/srv/ci/work";
          };
          other = {
            lowerStore = "/srv/base";
            root = "/srv/other/root";
            upperLayer = "/srv/room/upper";
            workDir = "/srv/room/work";
          };
        };
      };

      environment.systemPackages = lib.optional hasPrometheus pkgs.prometheus.cli;
      environment.etc."prometheus/layered-stores".source = ../docs/metrics;
      services.prometheus = lib.mkIf hasPrometheus {
        enable = true;
        globalConfig.scrape_interval = "1s";
        globalConfig.evaluation_interval = "1s";
        ruleFiles = [ ../docs/metrics/alerts.yaml ];
        scrapeConfigs = [
          {
            job_name = "node";
            static_configs = [ { targets = [ "localhost:9100" ]; } ];
          }
        ];
        exporters.node = {
          enable = true;
          extraFlags = [ "--collector.textfile.directory=/var/lib/prometheus/node-exporter" ];
        };
      };
    };

  testScript = builtins.readFile ./metrics.py;
}
