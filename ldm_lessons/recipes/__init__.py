"""How the course's models were made, each by one command from nothing:

    python -m ldm_lessons.recipes judge        # and then vae, text, clip, unet, in this order
    torchrun --standalone --nproc_per_node 2 -m ldm_lessons.recipes vae     # two processes, one core each
    accelerate launch -m ldm_lessons.recipes unet                           # as `accelerate config` says: GPUs

A run that is killed goes on where its last checkpoint was, by the same command. Checkpoints and drawn pictures live in
`runs/`, results in `data/`.
"""
