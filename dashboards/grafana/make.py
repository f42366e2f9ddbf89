"""Makes the dashboards: `python dashboards/grafana/make.py` writes `dashboards/*.json` beside it.

Grafana's own builders know the schema; whoever wants another panel changes this file, not those.
Values of variables come as quoted strings (`${arm:doublequote}`), so that any name is one.
"""

from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, stat, table, timeseries
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
NEEDS_GPU = "Needs a GPU: empty without one."
"""How the description of such a panel begins."""

PAGES = {"Ray": "http://127.0.0.1:8265", "MLflow": "http://127.0.0.1:5000"}
"""As `ray dashboard` and `knet ui` open them."""

SWEEP = "sweep=${sweep:doublequote}"
TRIAL = f"{SWEEP}, arm=${{arm:doublequote}}, seed=${{seed:doublequote}}"
BY_TRIAL = "max by (sweep, arm, seed)"
ARM = "{{arm}}/{{seed}}"

Panel = timeseries.Panel | stat.Panel | bargauge.Panel | table.Panel


def query(expr: str, legend: str = "", *, instant: bool = False) -> queries.Dataquery:
    """Return one query of a panel, over its range or of its end."""
    made = queries.Dataquery().expr(expr).legend_format(legend or "__auto")
    return made.instant() if instant else made.range()


def lettered(asked: Sequence[queries.Dataquery]) -> list[queries.Dataquery]:
    """Give the queries of a panel the names that Grafana tells them apart by."""
    return [each.ref_id(letter) for each, letter in zip(asked, "ABCDEF", strict=False)]


def curves(
    title: str, *asked: queries.Dataquery, unit: str = "short", about: str = "", width: int = 12
) -> timeseries.Panel:
    """Return curves over time."""
    legend = common.VizLegendOptions().show_legend(True)
    legend = legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).datasource(SOURCE).unit(unit).legend(legend)
    return panel.description(about).span(width).height(8).targets(lettered(asked))


def number(
    title: str, expr: str, *, unit: str = "short", about: str = "", width: int = 4
) -> stat.Panel:
    """Return the latest value in large print; of a sweep that has ended too."""
    panel = stat.Panel().title(title).datasource(SOURCE).unit(unit).no_value("not known")
    panel = panel.description(about).span(width).height(4)
    return panel.targets(lettered([query(expr)]))


def bars(
    title: str, expr: str, legend: str, *, unit: str = "short", about: str = ""
) -> bargauge.Panel:
    """Return the latest values as bars."""
    panel = bargauge.Panel().title(title).datasource(SOURCE).unit(unit).min(0).description(about)
    return panel.span(12).height(8).targets(lettered([query(expr, legend)]))


def board(
    uid: str,
    title: str,
    about: str,
    variables: Sequence[QueryVariable],
    panels: Sequence[Panel],
) -> Dashboard:
    """Return a dashboard with its panels from left to right, and its way to the other pages."""
    made = Dashboard(title).uid(f"knet-{uid}").description(about).tags(["knet"]).editable()
    made = made.time("now-3h", "now").refresh("30s").timezone("browser")
    made = made.with_variable(DatasourceVariable("datasource").type("prometheus").label("Source"))
    for each in variables:
        made = made.with_variable(each)
    others = DashboardLink("K-Net").type(DashboardLinkType.DASHBOARDS).tags(["knet"])
    made = made.link(others.include_vars(True).keep_time(True))
    for name, address in PAGES.items():
        link = DashboardLink(name).type(DashboardLinkType.LINK).url(address)
        made = made.link(link.target_blank(True).icon("external link"))
    for place, panel in enumerate(panels, start=1):
        made = made.with_panel(panel.id(place))
    return made


def variable(name: str, values: str) -> QueryVariable:
    """Return a choice among the values that a label has had in the range shown."""
    asked: dict[str, object] = {"query": values, "refId": name}
    made = QueryVariable(name).label(name.title()).datasource(SOURCE).query(asked)
    return made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)


CHOOSE_SWEEP = variable("sweep", "label_values(ray_knet_sweep_trials, sweep)")


def sweep_board() -> Dashboard:
    """Return how a sweep stands: which arm wins, what is still to come, what it costs."""
    best = (
        f"avg by (arm, metric) (max by (arm, seed, metric) "
        f"(last_over_time(ray_knet_trial_evaluation{{{SWEEP}}}[$__range])))"
    )
    order = DataTransformerConfig(
        id_val="organize",
        options={"excludeByName": {"Time": True}, "renameByName": {"Value": "value"}},
    )
    winners = table.Panel().title("Arms").datasource(SOURCE).span(12).height(8)
    winners = winners.description("The sweep's metric as last measured, mean over seeds.")
    winners = winners.targets(lettered([query(best, instant=True).format(PromQueryFormat.TABLE)]))
    winners = winners.with_transformation(order).decimals(4)
    winners = winners.sort_by([common.TableSortByFieldState().display_name("value").desc(True)])
    panels: tuple[Panel, ...] = (
        number("GPU-hours", f"max(ray_knet_sweep_gpu_seconds{{{SWEEP}}}) / 3600", unit="h"),
        number(
            "Cost",
            f"max(ray_knet_sweep_cost_usd{{{SWEEP}}})",
            unit="currencyUSD",
            about="Known where the sweep names an instance, a price or a budget in USD.",
        ),
        number(
            "Budget spent",
            f"max(sweep_limit:knet_sweep_budget_used:ratio{{{SWEEP}}})",
            unit="percentunit",
            about="Of the limit that is nearer, money or GPU-hours; not known without a budget.",
        ),
        number(
            "Retries",
            f"sum(ray_knet_sweep_retries_total{{{SWEEP}}}) or vector(0)",
            about="Attempts that ended and were followed by another.",
        ),
        number(
            "Updates for MLflow that wait",
            f"max(ray_knet_sweep_unsent_records{{{SWEEP}}})",
            about="They wait in the journal; knet sync sends what is left.",
        ),
        number("Alerts", 'count(ALERTS{alertname=~"Knet.*", alertstate="firing"}) or vector(0)'),
        winners,
        bars("Trials", f"max by (state) (ray_knet_sweep_trials{{{SWEEP}}})", "{{state}}"),
        curves(
            "Evaluation",
            query(
                f"max by (arm, seed, metric) (ray_knet_trial_evaluation{{{SWEEP}}})",
                f"{ARM} {{{{metric}}}}",
            ),
        ),
        curves("Loss", query(f"max by (arm, seed) (ray_knet_trial_loss{{{SWEEP}}})", ARM)),
        curves(
            "Progress",
            query(f"sweep_arm_seed:knet_trial_progress:ratio{{{SWEEP}}}", ARM),
            unit="percentunit",
        ),
        curves(
            "Attempts",
            query(f"max by (arm, seed) (ray_knet_trial_attempt{{{SWEEP}}})", ARM),
            about="Which one each running trial is at.",
        ),
    )
    return board("sweep", "K-Net: sweep", "How a sweep stands.", [CHOOSE_SWEEP], panels)


def trial_board() -> Dashboard:
    """Return how one trial goes."""
    step = f"ray_knet_trial_step{{{SWEEP}}}"
    arm = f"ray_knet_trial_step{{{SWEEP}, arm=${{arm:doublequote}}}}"
    choices = [
        CHOOSE_SWEEP,
        variable("arm", f"label_values({step}, arm)"),
        variable("seed", f"label_values({arm}, seed)"),
    ]

    def of(name: str) -> str:
        return f"{BY_TRIAL} (ray_knet_trial_{name}{{{TRIAL}}})"

    panels: tuple[Panel, ...] = (
        curves("Loss", query(of("loss"), "loss")),
        curves(
            "Evaluation",
            query(f"max by (metric) (ray_knet_trial_evaluation{{{TRIAL}}})", "{{metric}}"),
        ),
        curves(
            "Steps",
            query(of("step"), "done"),
            query(of("planned_steps"), "planned"),
        ),
        curves("Images per second", query(of("images_per_second"), "all workers")),
        curves(
            "Waiting for images",
            query(of("data_wait_ratio"), "share of the time"),
            unit="percentunit",
        ),
        curves(
            "Not saved",
            query(f"sweep_arm_seed:knet_trial_unsaved:seconds{{{TRIAL}}}", "checkpoint's age"),
            query(f"sweep_arm_seed:knet_trial_silence:seconds{{{TRIAL}}}", "last report's age"),
            unit="s",
            about="What would be lost if the trial were taken away now.",
        ),
        curves("Attempt", query(of("attempt"), "attempt")),
        curves("Host memory", query(of("host_memory_bytes"), "first worker"), unit="bytes"),
        curves(
            "GPU memory",
            query(of("gpu_memory_bytes"), "most of tensors"),
            unit="bytes",
            about=NEEDS_GPU,
        ),
        curves(
            "GPU busy",
            query(of("gpu_utilization_ratio"), "first worker's"),
            unit="percentunit",
            about=NEEDS_GPU,
        ),
    )
    return board("trial", "K-Net: one trial", "How one trial goes.", choices, panels)


def cluster_board() -> Dashboard:
    """Return what every machine does, and what it costs."""
    gpu_used = 'sum(ray_resources{Name="GPU", State="USED"})'
    gpu_there = 'sum(ray_resources{Name="GPU"})'
    panels: tuple[Panel, ...] = (
        curves("Nodes", query("cluster:ray_nodes:count", "there")),
        curves("Running trials", query("sweep:knet_trials_running:count", "{{sweep}}")),
        curves(
            "Cost",
            query("max by (sweep) (ray_knet_sweep_cost_usd)", "{{sweep}}"),
            unit="currencyUSD",
            about="Known where a sweep names an instance, a price or a budget in USD.",
        ),
        curves(
            "Budget spent",
            query("sweep_limit:knet_sweep_budget_used:ratio", "{{sweep}} {{limit}}"),
            unit="percentunit",
        ),
        curves(
            "GPU-hours",
            query("max by (sweep) (ray_knet_sweep_gpu_seconds) / 3600", "{{sweep}}"),
            unit="h",
        ),
        curves(
            "Groups of workers that wait for machines",
            query('sum(ray_gcs_placement_group_count{State="Pending"})', "waiting"),
        ),
        curves(
            "Processors busy",
            query("max by (instance) (ray_node_cpu_utilization)", "{{instance}}"),
            unit="percent",
        ),
        curves(
            "Memory in use",
            query("max by (instance) (ray_node_mem_used / ray_node_mem_total)", "{{instance}}"),
            unit="percentunit",
        ),
        curves(
            "Disk in use",
            query("max by (instance) (ray_node_disk_utilization_percentage)", "{{instance}}"),
            unit="percent",
        ),
        curves(
            "GPUs held by trials",
            query(gpu_used, "held"),
            query(gpu_there, "there"),
            about=NEEDS_GPU,
        ),
        curves(
            "GPUs busy",
            query(
                "max by (instance, GpuIndex) (ray_node_gpus_utilization)",
                "{{instance}} {{GpuIndex}}",
            ),
            unit="percent",
            about=NEEDS_GPU,
        ),
        curves(
            "GPUs held and idle",
            query("node:knet_gpus_idle:count", "{{ip}}"),
            about=NEEDS_GPU,
        ),
        curves(
            "GPU memory in use",
            query(
                "max by (instance, GpuIndex) (ray_node_gram_used) * 1024 * 1024",
                "{{instance}} {{GpuIndex}}",
            ),
            unit="bytes",
            about=NEEDS_GPU,
        ),
    )
    about = "What every machine does, and what it costs."
    return board("cluster", "K-Net: cluster and cost", about, [], panels)


def data_board() -> Dashboard:
    """Return whether images come as fast as they are trained on."""
    panels: tuple[Panel, ...] = (
        curves(
            "Waiting for images",
            query(f"max by (arm, seed) (ray_knet_trial_data_wait_ratio{{{SWEEP}}})", ARM),
            unit="percentunit",
            about="Share of the time; over 30 % for a quarter of an hour is an alert.",
        ),
        curves(
            "Waiting for images, a quarter of an hour",
            query(f"sweep_arm_seed:knet_trial_data_wait:ratio15m{{{SWEEP}}}", ARM),
            unit="percentunit",
        ),
        curves(
            "Images per second",
            query(f"max by (arm, seed) (ray_knet_trial_images_per_second{{{SWEEP}}})", ARM),
        ),
        curves(
            "Images per second, all trials",
            query(
                f"sum(max by (arm, seed) (ray_knet_trial_images_per_second{{{SWEEP}}}))",
                "images per second",
            ),
        ),
        curves(
            "Processors busy",
            query("max by (instance) (ray_node_cpu_utilization)", "{{instance}}"),
            unit="percent",
            about="Images are decoded and augmented here.",
        ),
        curves(
            "Read from disk",
            query("max by (instance) (ray_node_disk_io_read_speed)", "{{instance}}"),
            unit="Bps",
        ),
        curves(
            "Received by network",
            query("max by (instance) (ray_node_network_receive_speed)", "{{instance}}"),
            unit="Bps",
            about="Staging fetches a data set once to a machine.",
        ),
        curves(
            "Host memory of first workers",
            query(f"max by (arm, seed) (ray_knet_trial_host_memory_bytes{{{SWEEP}}})", ARM),
            unit="bytes",
        ),
        curves(
            "GPU busy",
            query(f"max by (arm, seed) (ray_knet_trial_gpu_utilization_ratio{{{SWEEP}}})", ARM),
            unit="percentunit",
            about=NEEDS_GPU,
        ),
    )
    about = "Whether images come as fast as they are trained on."
    return board("data", "K-Net: data pipeline", about, [CHOOSE_SWEEP], panels)


def make() -> dict[str, str]:
    """Return the dashboards' files by their names."""
    boards = (sweep_board(), trial_board(), cluster_board(), data_board())
    encoder = JSONEncoder(sort_keys=True, indent=1)
    built = [each.build() for each in boards]
    return {f"{each.uid}.json": encoder.encode(each) + "\n" for each in built}


if __name__ == "__main__":
    for name, text in make().items():
        (FOLDER / name).write_text(text)
