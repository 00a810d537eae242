//! The real models, by names and shapes alone: as many tensors and numbers as the published checkpoints have.

use models::dit::DitConfig;
use models::umt5::Umt5Sizes;
use models::vae::{Generation, Sizes};
use models::weights::TensorSpec;

/// (tensors, numbers) of a list of tensors, whose names must differ.
fn counted(specs: Vec<TensorSpec>) -> (usize, usize) {
    let names: std::collections::BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names.len(), specs.len(), "a name stands twice");
    (specs.len(), specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum())
}

fn t2v(dim: usize, ffn_dim: usize, heads: usize, layers: usize) -> DitConfig {
    let (in_channels, out_channels, text_dim, text_len, freq_dim, eps) = (16, 16, 4096, 512, 256, 1e-6);
    DitConfig { dim, ffn_dim, heads, layers, in_channels, out_channels, text_dim, text_len, freq_dim, eps }
}

#[test]
fn the_dits_have_the_published_tensors_and_adapters() {
    let (small, large) = (t2v(1536, 8960, 12, 30), t2v(5120, 13824, 40, 40));
    assert_eq!(counted(small.tensors()), (825, 1_418_996_800));
    assert_eq!(counted(large.tensors()), (1095, 14_288_491_584));
    // Rank 32 on all ten modules of a block, as other trainers' files of these models count.
    let factors = |config: &DitConfig| -> usize {
        config.adaptable_modules().iter().map(|(_, out, input)| 32 * (out + input)).sum()
    };
    assert_eq!((small.adaptable_modules().len(), factors(&small)), (300, 43_745_280));
    assert_eq!((large.adaptable_modules().len(), factors(&large)), (400, 153_354_240));
}

#[test]
fn the_vaes_have_the_published_tensors() {
    let sizes = |generation, latent, encoder, decoder| Sizes { generation, latent, encoder, decoder };
    assert_eq!(counted(sizes(Generation::Wan21, 16, 96, 96).tensors()), (194, 126_892_531));
    assert_eq!(counted(sizes(Generation::Wan22, 48, 160, 256).tensors()), (196, 704_688_668));
}

#[test]
fn the_text_encoder_has_the_published_tensors() {
    let sizes = Umt5Sizes {
        vocabulary: 256_384,
        width: 4096,
        layers: 24,
        heads: 64,
        inner: 4096,
        feed_forward: 10_240,
        buckets: 32,
    };
    assert_eq!(counted(sizes.tensors()), (242, 5_680_910_336));
}
