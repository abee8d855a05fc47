"""What a conversation may hold beside text. Nothing here lists them: each is a class and a file in
``conf/model/modality/``."""
