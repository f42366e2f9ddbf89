import torch
from torch.nn import functional as F

from knet_core.postprocess import instances, semantic_maps
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


def naive_probabilities(prediction, image):
    height, width = INFOS[image].input_size
    masks = prediction.masks[image : image + 1]
    logits = F.interpolate(masks, scale_factor=2, mode="bilinear")
    p = F.interpolate(logits.sigmoid(), size=(64, 96), mode="bilinear")[..., :height, :width]
    return F.interpolate(p, size=INFOS[image].original_size, mode="bilinear")[0]


def test_instances_follow_the_published_order_of_resizing():
    prediction = stage()
    for b, result in enumerate(instances(prediction, INFOS, max_detections=7)):
        p = naive_probabilities(prediction, b)
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


def test_instances_of_many_kernels_equal_those_resized_all_at_once():
    """Some kernels are chosen twice or more, others never; chunks end in 1 to 16 of them."""
    for num_kernels in (16, 17, 19, 50):
        prediction = stage(num_kernels, num_kernels=num_kernels, num_classes=4)
        found = instances(prediction, INFOS, max_detections=60)
        for b, result in enumerate(found):
            p = naive_probabilities(prediction, b)
            scores = prediction.class_logits.sigmoid()[b]
            best = scores.flatten().topk(min(60, scores.numel()))
            assert torch.equal(result.scores, best.values)
            kernels = best.indices // 4
            assert torch.equal(result.masks, p[kernels] > 0.5)


def test_instances_of_a_batch_equal_those_of_its_images_alone():
    prediction = stage(3, num_kernels=20)
    together = instances(prediction, INFOS, max_detections=30)
    for b, info in enumerate(INFOS):
        alone = StageOutput(
            masks=prediction.masks[b : b + 1],
            class_logits=prediction.class_logits[b : b + 1],
            kernels=prediction.kernels[b : b + 1],
        )
        (result,) = instances(alone, [info], max_detections=30)
        assert torch.equal(result.masks, together[b].masks)
        assert torch.equal(result.labels, together[b].labels)


def test_no_more_detections_than_kernels_times_classes():
    assert len(instances(stage(), INFOS, max_detections=100)[0].scores) == 15


def test_semantic_maps_are_the_likeliest_class_of_logits_resized_twice():
    """At strides 4, 8 and 32, with more classes than are resized at a time, and with ties."""
    for height, width in ((16, 24), (8, 12), (2, 3)):
        g = torch.Generator().manual_seed(height)
        masks = torch.randn(2, 20, height, width, generator=g)
        masks = torch.cat([masks, masks], dim=1)
        prediction = StageOutput(masks=masks, class_logits=None, kernels=torch.zeros(2, 40, 4))
        found = semantic_maps(prediction, INFOS, padded_size=(64, 96))
        for b, (result, info) in enumerate(zip(found, INFOS, strict=True)):
            logits = F.interpolate(masks[b : b + 1], size=(64, 96), mode="bilinear")
            logits = logits[..., : info.input_size[0], : info.input_size[1]]
            logits = F.interpolate(logits, size=info.original_size, mode="bilinear")[0]
            assert result.labels.dtype == torch.uint8
            assert torch.equal(result.labels.long(), logits.argmax(dim=0))
