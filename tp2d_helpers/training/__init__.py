"""What accompanies the loop: a record per step, texts to look at, a watchdog against hangs, nodes that go and come."""

from tp2d_helpers import lazy

__getattr__ = lazy(
    __name__,
    {
        "StepMetrics": "metrics",
        "read_metrics": "metrics",
        "log_to_file": "metrics",
        "read_samples": "samples",
        "schedule_learning_rate": "schedule",
        "Watchdog": "watchdog",
        "GridTrainer": "elastic",
        "PreemptionNotice": "elastic",
        "possible_dp_sizes": "elastic",
    },
)
