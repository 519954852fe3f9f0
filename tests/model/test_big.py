"""``gsscale-big``, trained with the settings that it is registered with."""

from __future__ import annotations

from benchmarks import ns_config
from tests.runs import seeded, tiny_scene, train


def test_it_keeps_more_gaussians_and_can_be_evaluated(tmp_path):
    scene = tiny_scene(tmp_path / "scene")
    rows = {}
    for method in ("gsscale", "gsscale-big"):
        config = ns_config.parse(
            ns_config.train_arguments(
                method=method,
                scene=scene,
                steps=25,
                seed=1,
                engine="auto",
                overrides=[
                    "machine.device-type=cpu",
                    "pipeline.model.num-downscales=0",
                    "pipeline.model.warmup-length=5",
                    "pipeline.model.refine-every=10",
                ],
                dataparser_overrides=["eval-mode=interval", "eval-interval=4"],
                output_dir=tmp_path,
            )
        )
        assert config.method_name == method
        seeded(1)
        trainer = train(config)
        rows[method] = trainer.pipeline.model.num_points
        metrics = trainer.pipeline.get_average_eval_image_metrics()
        assert metrics["psnr"] > 5
    assert rows["gsscale"] < rows["gsscale-big"], rows
