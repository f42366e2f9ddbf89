import torch
from torch.nn import functional as F

from knet_core.postprocess import instances
from knet_core.structures import ImageInfo, StageOutput


def stage(seed=0, *, num_kernels=5, num_classes=3):
    g = torch.Generator().manual_seed(seed)
    return StageOutput(
        masks=torch.randn(2, num_kernels, 8, 12, generator=g) * 3,
        class_logits=torch.randn(2, num_kernels, num_classes, generator=g),
        kernels=torch.zeros(2, num_kernels, 4),
    )


INFOS = [
    ImageInfo(image_id=1, file_name="a.jpg", input_size=(60, 90), original_size=(120, 181)),
    ImageInfo(image_id=2, file_name="b.jpg", input_size=(64, 96), original_size=(64, 96)),
]


def test_instances_follow_the_published_order_of_resizing():
    prediction = stage()
    for b, result in enumerate(instances(prediction, INFOS, 7)):
        height, width = INFOS[b].input_size
        logits = F.interpolate(prediction.masks[b : b + 1], scale_factor=2, mode="bilinear")
        p = F.interpolate(logits.sigmoid(), size=(64, 96), mode="bilinear")[..., :height, :width]
        p = F.interpolate(p, size=INFOS[b].original_size, mode="bilinear")[0]
        ranked = sorted(
            (
                (s.sigmoid().item(), k, c)
                for k, row in enumerate(prediction.class_logits[b])
                for c, s in enumerate(row)
            ),
            reverse=True,
        )[:7]
        assert result.scores.tolist() == [score for score, _, _ in ranked]
        assert result.labels.tolist() == [label for _, _, label in ranked]
        for mask, (_, kernel, _) in zip(result.masks, ranked, strict=True):
            assert torch.equal(mask, p[kernel] > 0.5)


def test_no_more_detections_than_kernels_times_classes():
    assert len(instances(stage(), INFOS, 100)[0].scores) == 15
