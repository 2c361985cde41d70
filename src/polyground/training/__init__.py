"""The trainers: supervised (`sft`) and group-relative (`grpo`), both transformers' `Trainer` with a peft adapter, and the
pretraining of the packaged base (`pretrain`). What they train on, and where it goes, is the stages' business."""
