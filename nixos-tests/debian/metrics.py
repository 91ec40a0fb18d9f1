# Debian's Prometheus and node exporter, as they come but for how often they look.

CONFIGURATION = """
global:
  scrape_interval: 1s
  evaluation_interval: 1s
rule_files:
  - /etc/prometheus/layered-stores/alerts.yaml
scrape_configs:
  - job_name: node
    static_configs:
      - targets: ["localhost:9100"]
"""

machine.wait_for_unit("multi-user.target")
machine.succeed(
    # What their pages are drawn with is not installed.
    "cd /var/cache/packages; dpkg --install --force-depends adduser_*.deb promtool_*.deb "
    "prometheus-node-exporter_*.deb prometheus_*.deb 2>&1",
    "ln -s /usr/share/doc/layered-stores/docs/metrics /etc/prometheus/layered-stores",
    f"cat >/etc/prometheus/prometheus.yml <<'END'\n{CONFIGURATION}\nEND",
    "systemctl restart prometheus.service",
    "systemctl enable --now layered-stores-metrics.timer layered-stores-metrics.socket 2>&1",
)
